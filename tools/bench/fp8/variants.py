"""The compared numerics as settings of a recipe, and the model and optimizer they share."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"model": {"dtype": "float32"}},
    "bf16": {},
    "blockwise": {"fp8": {"recipe": "blockwise"}},
    "blockwise, fp32 scales": {"fp8": {"recipe": "blockwise", "scales": "float32"}},
    "tensorwise": {"fp8": {"recipe": "tensorwise"}},
    "mxfp8": {"fp8": {"recipe": "mxfp8"}},
}
BASELINE = "bf16"
"""The numerics with which the DeepSeek-V3 report compares FP8 (appendix B.1)."""

VOCABULARY = 64
MODEL: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "float32",
}
SHARED: dict[str, Any] = {
    "model": {"dtype": "bfloat16", "init": "random", "init_std": 0.03, "mtp": "none"},
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "parallel": {"tokens_per_microbatch": 4096},
}
WARMUP_STEPS = 10


def settings(variant: str, model_folder: str, seed: int, threads: int) -> dict[str, Any]:
    """Return the recipe of `variant` for megatron_r1.config.parse."""
    tree = {section: dict(values) for section, values in SHARED.items()}
    for section, values in VARIANTS[variant].items():
        tree.setdefault(section, {}).update(values)
    tree["model"]["path"] = model_folder
    tree["parallel"]["threads"] = threads
    tree["run"] = {"seed": seed}
    return tree
