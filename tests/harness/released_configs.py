"""config.json of released models, and how many parameters they are published with.

The numbers are in billions, without MTP layers (None: no such number is published).
tests/reports/end_tokens.yaml has the tokens that end their responses, and where each id is
published."""

QWEN3 = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False},
    **{"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645},
    **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02},
    **{"intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28},
    **{"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8},
    **{"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000},
    **{"sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False},
    **{"vocab_size": 151936},
}
QWEN3_MOE = {
    **QWEN3,
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
    **{"decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144},
    **{"max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768},
    **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128},
    **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4},
    **{"output_router_logits": False, "router_aux_loss_coef": 0.001},
    **{"tie_word_embeddings": False},
}
SMOLLM2 = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False},
    **{"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    **{"hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664},
    **{"intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192},
    **{"mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30},
    **{"num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
    **{"rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
    **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    **{"transformers_version": "4.42.3", "vocab_size": 49152},
}
QWEN25 = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0},
    **{"bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu"},
    **{"hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960},
    **{"max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 12},
    **{"num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": True},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True},
    **{"use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
}
V2_LITE = {
    **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
    **{"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}},
    **{"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001},
    **{"bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1},
    **{"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02},
    **{"intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840},
    **{"moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False},
    **{"num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27},
    **{"num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6},
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707},
        **{"mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    **{"rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax"},
    **{"seq_aux": True, "tie_word_embeddings": False, "topk_method": "greedy"},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True},
    **{"v_head_dim": 128, "vocab_size": 102400},
}
KIMI_K2 = {
    **V2_LITE,
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "ep_size": 1},
    **{"bos_token_id": 163584, "eos_token_id": 163585},
    **{"hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 131072},
    **{"moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "num_attention_heads": 64, "num_key_value_heads": 64},
    **{"num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 0},
    **{"q_lora_rank": 1536, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid"},
    **{"topk_method": "noaux_tc", "vocab_size": 163840, "rope_theta": 50000.0},
    "rope_scaling": {
        **{"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0},
        **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "quantization_config": {
        **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
        "weight_block_size": [128, 128],
    },
}
GLM_AIR = {
    **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True},
    **{"attention_dropout": 0.0, "pad_token_id": 151329, "eos_token_id": [151329, 151336]},
    **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "partial_rotary_factor": 0.5},
    **{"initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072},
    **{"moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 96},
    **{"n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1},
    **{"routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1},
    **{"num_hidden_layers": 46, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    **{"rope_scaling": None, "rope_theta": 1000000, "num_nextn_predict_layers": 1},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    **{"transformers_version": "4.54.1", "use_qk_norm": False, "vocab_size": 151552},
}
GPT_OSS = {
    **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True},
    **{"attention_dropout": 0.0, "eos_token_id": 200002, "pad_token_id": 199999},
    **{"experts_per_token": 4, "num_experts_per_tok": 4, "num_local_experts": 32},
    **{"head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880},
    **{"initial_context_length": 4096, "initializer_range": 0.02, "sliding_window": 128},
    **{"layer_types": ["sliding_attention", "full_attention"] * 12, "num_hidden_layers": 24},
    **{"max_position_embeddings": 131072, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 150000},
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn"},
        **{"original_max_position_embeddings": 4096, "truncate": False},
    },
    **{"router_aux_loss_coef": 0.9, "swiglu_limit": 7.0, "tie_word_embeddings": False},
    **{"transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088},
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        "quant_method": "mxfp4",
    },
}

QWEN3_8B = {
    **QWEN3,
    **{"hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36},
    **{"num_attention_heads": 32, "num_hidden_layers": 36, "tie_word_embeddings": False},
}
FP8 = {
    **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
    "weight_block_size": [128, 128],
}
R1_QWEN3_8B = {
    **{**QWEN3_8B, "max_position_embeddings": 131072},
    "rope_scaling": {
        **{"attn_factor": 0.8782488562869419, "factor": 4.0, "rope_type": "yarn"},
        "original_max_position_embeddings": 32768,
    },
}
QWEN3_CODER = {
    **{**QWEN3_MOE, "intermediate_size": 5472, "max_position_embeddings": 262144},
    **{"qkv_bias": False, "rope_theta": 10000000, "use_qk_norm": True},
    **{"router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0},
}
R1_QWEN_7B = {
    **{**QWEN25, "hidden_size": 3584, "intermediate_size": 18944, "rope_theta": 10000},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "sliding_window": 4096},
    **{"tie_word_embeddings": False, "vocab_size": 152064},
}
LLAMA32_1B = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False},
    **{"attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
    **{"head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02},
    **{"intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False},
    **{"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8},
    **{"pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "rope_scaling": {
        **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
        **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True},
    **{"transformers_version": "4.45.0.dev0", "vocab_size": 128256},
}
LLAMA31_8B = {
    **{key: value for key, value in LLAMA32_1B.items() if key != "head_dim"},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"rope_scaling": {**LLAMA32_1B["rope_scaling"], "factor": 8.0}},
    "tie_word_embeddings": False,
}
SMOLLM2_360M = {
    **{**SMOLLM2, "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15},
    **{"num_hidden_layers": 32, "num_key_value_heads": 5},
}
V31 = {
    **{**KIMI_K2, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "n_group": 8},
    **{"bos_token_id": 0, "eos_token_id": 1},
    **{"topk_group": 4, "max_position_embeddings": 163840, "n_routed_experts": 256},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "num_nextn_predict_layers": 1},
    **{"rope_scaling": {**V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0}},
    **{"rope_theta": 10000, "routed_scaling_factor": 2.5, "vocab_size": 129280},
    "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
}
MOONLIGHT = {
    **{**V2_LITE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
    **{"bos_token_id": 163584, "eos_token_id": 163585},
    **{"intermediate_size": 11264, "max_position_embeddings": 8192, "norm_topk_prob": True},
    **{"num_nextn_predict_layers": 0, "rms_norm_eps": 1e-5, "rope_scaling": None},
    **{"rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid"},
    **{"topk_method": "noaux_tc", "vocab_size": 163840},
}
GLM_46 = {
    **{**GLM_AIR, "hidden_size": 5120, "intermediate_size": 12288, "use_qk_norm": True},
    **{"max_position_embeddings": 202752, "moe_intermediate_size": 1536},
    **{"n_routed_experts": 160, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3},
    "num_hidden_layers": 92,
}
# Without scoring_func; written by transformers 5.
GLM_47_FLASH = {
    **{"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"},
    **{"attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16"},
    **{"eos_token_id": [154820, 154827, 154829], "first_k_dense_replace": 1, "hidden_act": "silu"},
    **{"hidden_size": 2048, "intermediate_size": 10240, "kv_lora_rank": 512, "n_group": 1},
    **{"max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_routed_experts": 64},
    **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20},
    **{"num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20},
    **{"num_nextn_predict_layers": 1, "pad_token_id": 154820, "partial_rotary_factor": 1.0},
    **{"q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5},
    **{"rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.8},
    **{"tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc"},
    **{"transformers_version": "5.0.0rc0", "v_head_dim": 256, "vocab_size": 154880},
}

RELEASED = {
    "Qwen3-0.6B": (QWEN3, 0.596049920),
    "Qwen3-30B-A3B": (QWEN3_MOE, 30.532122624),
    "SmolLM2-135M": (SMOLLM2, 0.134515008),
    "Qwen2.5-Math-1.5B": (QWEN25, 1.543714304),
    "DeepSeek-V2-Lite": (V2_LITE, 15.706484224),
    "Kimi-K2-Instruct": (KIMI_K2, 1026.0),
    "GLM-4.5-Air": (GLM_AIR, 106.9),
    "gpt-oss-20b": (GPT_OSS, 20.914757184),
    "Qwen3-8B-FP8": ({**QWEN3_8B, "quantization_config": FP8}, 8.190735360),
    "DeepSeek-R1-0528-Qwen3-8B": (R1_QWEN3_8B, 8.190735360),
    "Qwen3-Coder-30B-A3B": (QWEN3_CODER, 30.532122624),
    "DeepSeek-R1-Distill-Qwen-7B": (R1_QWEN_7B, 7.615616512),
    "Llama-3.2-1B": (LLAMA32_1B, 1.235814400),
    "DeepSeek-R1-Distill-Llama-8B": (LLAMA31_8B, 8.030261248),
    "SmolLM2-360M": (SMOLLM2_360M, 0.361821120),
    "DeepSeek-V3.1": (V31, 671.0),
    "Moonlight-16B-A3B": (MOONLIGHT, None),
    "GLM-4.6": (GLM_46, None),
    "GLM-4.7-Flash": (GLM_47_FLASH, None),
}
