"""Small configurations of every architecture, as `config.json` contents. Odd sizes on purpose."""

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "rope_theta": 10000.0,
}

DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "q_lora_rank": 36,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
    "rope_parameters": YARN,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
}

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}

LLAMA = {
    **QWEN,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 12,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 64,
    },
}
del LLAMA["use_sliding_window"]

QWEN3 = {
    **QWEN,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 12,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
ROUTED = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
}
QWEN3_MOE = {
    **{**QWEN3, **ROUTED, "num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
}
SIGMOID = {
    **ROUTED,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
GLM = {
    **{key: value for key, value in QWEN3.items() if key != "use_sliding_window"},
    **SIGMOID,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "use_qk_norm": True,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GLM_LITE = {
    **{key: value for key, value in DEEPSEEK.items() if not key.startswith(("topk_m", "scoring"))},
    **SIGMOID,
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 1.0},
    "rms_norm_eps": 1e-5,
}
# Moonlight and Kimi-K2: one group of experts, and an epsilon that the latent norms do not have.
KIMI = {
    **DEEPSEEK,
    **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "rms_norm_eps": 1e-2},
    "rope_parameters": {**YARN, "beta_fast": 1.0, "factor": 32.0},
}
# Its best two experts score a group, whatever the number that is chosen.
FEW_CHOSEN = {**DEEPSEEK, "num_experts_per_tok": 3, "norm_topk_prob": False}
DEEPSEEK_V2 = {
    **DEEPSEEK,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
V2_LITE = {
    **{**DEEPSEEK_V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": None, "routed_scaling_factor": 1.0},
}
# A window shorter than some sequences and longer than others.
GPT_OSS = {
    **{key: value for key, value in QWEN3.items() if key != "use_sliding_window"},
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 36,
    "sliding_window": 11,
    "swiglu_limit": 7.0,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
}

FIRST = {
    "deepseek-yarn-mtp": {**DEEPSEEK, "num_nextn_predict_layers": 1},
    "qwen-tied": {**QWEN, "tie_word_embeddings": True},
    "llama3": LLAMA,
}
"""Compared on every grid; the others, on fewer, have the same parts in other combinations."""

MODELS = {
    **FIRST,
    "deepseek-plain-noqlora": {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": PLAIN_ROPE},
    "qwen-untied": QWEN,
    "qwen3": QWEN3,
    # Fewer key and value heads than tensor ranks.
    "qwen3-one-kv-head": {**QWEN3, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen-two-kv-heads": {**QWEN, "num_attention_heads": 4, "head_dim": 12},
    "qwen3-moe": QWEN3_MOE,
    "glm-mtp": GLM,
    "glm-no-norm": {**GLM, "use_qk_norm": False, "num_nextn_predict_layers": 0},
    "glm-lite-mtp": GLM_LITE,
    "kimi": KIMI,
    "deepseek-few-chosen": FEW_CHOSEN,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v2-lite": V2_LITE,
    "gpt-oss": GPT_OSS,
}

LENGTHS = [30, 100, 7, 1, 64, 17]
"""Tokens of the sequences every model is compared on."""

MTP_SCALE = 0.1
"""Weight of the MTP loss next to the main one (Megatron's mtp_loss_scaling_factor)."""
