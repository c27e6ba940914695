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

MODELS = {
    "deepseek-yarn-mtp": {**DEEPSEEK, "num_nextn_predict_layers": 1},
    "deepseek-plain-noqlora": {
        **DEEPSEEK,
        "q_lora_rank": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen-tied": {**QWEN, "tie_word_embeddings": True},
    "qwen-untied": QWEN,
    "llama3": LLAMA,
}

LENGTHS = [30, 100, 7, 1, 64, 17]
"""Tokens of the sequences every model is compared on."""

MTP_SCALE = 0.1
"""Weight of the MTP loss beside the main one (Megatron's mtp_loss_scaling_factor)."""
