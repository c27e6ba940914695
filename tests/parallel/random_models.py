"""Random small configurations of every architecture: sizes, kinds of layers, rotary settings and
routing are drawn independently, so that combinations occur that no published model has."""

import random

from small_models import (
    DEEPSEEK_V2,
    FIRST,
    GLM,
    GLM_LITE,
    GPT_OSS,
    LLAMA,
    MODELS,
    QWEN,
    QWEN3,
    QWEN3_MOE,
)

LLAMA3_ROPE = LLAMA["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALED = [None, {"type": "linear", "factor": 3.0}, YARN, {**YARN, "factor": 2.0, "truncate": False}]
BASES = {
    "llama": LLAMA,
    "qwen2": QWEN,
    "qwen3": QWEN3,
    "qwen3-moe": QWEN3_MOE,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v3": MODELS["deepseek-yarn-mtp"],
    "glm": GLM,
    "glm-lite": GLM_LITE,
    "gpt-oss": GPT_OSS,
}


def models_in(name: str) -> dict[str, dict]:
    """The configurations of a set by name: first, rest, small (both), drawn-N, N of each
    architecture, or one of MODELS."""
    if name in MODELS:
        return {name: MODELS[name]}
    if name == "first":
        return FIRST
    if name == "rest":
        return {key: hf_config for key, hf_config in MODELS.items() if key not in FIRST}
    if name == "small":
        return MODELS
    count = int(name.removeprefix("drawn-"))
    return {f"{base}-{i}": draw(base, i) for i in range(count) for base in BASES}


def draw(base: str, seed: int) -> dict:
    """A configuration of the architecture of BASES[base]. Every size is even or a multiple of 4
    where two ranks divide it."""
    pick = random.Random(f"{base}/{seed}")
    hf_config = dict(BASES[base])
    layers = pick.choice([2, 4])
    heads = pick.choice([2, 4, 6])
    hf_config |= {
        "vocab_size": pick.choice([61, 67, 96]),
        "hidden_size": 12 * pick.randint(2, 6),  # of a Llama, heads must divide it
        "intermediate_size": 4 * pick.randint(5, 25),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rms_norm_eps": pick.choice([1e-6, 1e-5, 1e-3]),
    }
    if "kv_lora_rank" in hf_config:
        _latent(hf_config, heads, pick)
    else:
        _grouped_query(hf_config, heads, pick)
    if "num_local_experts" in hf_config:
        _gpt_oss(hf_config, pick)
    elif "moe_intermediate_size" in hf_config:
        _experts(hf_config, layers, pick)
    else:
        hf_config["tie_word_embeddings"] = pick.random() < 0.5
    return hf_config


def _latent(hf_config: dict, heads: int, pick: random.Random) -> None:
    rope = {"rope_type": "default", "rope_theta": pick.choice([1e4, 5e4, 1e6])}
    if pick.random() < 0.5:
        mscale = pick.choice([None, 0.707, 1.0])
        scales = {"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}
        rope |= {
            **{"rope_type": "yarn", "factor": pick.choice([4.0, 32.0]), **scales},
            "original_max_position_embeddings": pick.choice([32, 64]),
            "beta_fast": pick.choice([1.0, 32.0]),
            "beta_slow": 1.0,
        }
    hf_config |= {
        "num_key_value_heads": heads,
        "q_lora_rank": pick.choice([None, 2 * pick.randint(8, 20)]),
        "kv_lora_rank": 2 * pick.randint(8, 24),
        "qk_nope_head_dim": 2 * pick.randint(4, 12),
        "qk_rope_head_dim": pick.choice([8, 16]),
        "v_head_dim": 2 * pick.randint(4, 12),
        "rope_parameters": rope,
    }


def _grouped_query(hf_config: dict, heads: int, pick: random.Random) -> None:
    hf_config |= {
        "num_key_value_heads": pick.choice([n for n in (1, 2, heads) if heads % n == 0]),
        "head_dim": 4 * pick.randint(2, 6),
        "rope_theta": pick.choice([1e4, 1e6]),
    }
    if hf_config["architectures"] == LLAMA["architectures"]:
        hf_config["rope_scaling"] = pick.choice(
            [*SCALED, LLAMA3_ROPE, {**LLAMA3_ROPE, "factor": 32.0}]
        )
    if hf_config["architectures"][0].startswith("Qwen"):
        hf_config["rope_scaling"] = pick.choice(SCALED)
    if "use_qk_norm" in hf_config:
        hf_config |= {
            "use_qk_norm": pick.random() < 0.5,
            "attention_bias": pick.random() < 0.5,
            "head_dim": 8 * pick.randint(1, 3),
            "partial_rotary_factor": pick.choice([0.25, 0.5, 1.0]),
        }


def _experts(hf_config: dict, layers: int, pick: random.Random) -> None:
    num_groups = pick.choice([1, 2, 4])
    kept = pick.choice([n for n in (1, 2) if n <= num_groups])
    per_group = pick.choice([2, 4])
    experts = num_groups * per_group if num_groups > 1 else pick.choice([4, 6, 16])
    limit = kept * per_group if kept < num_groups else experts
    hf_config |= {
        "moe_intermediate_size": 4 * pick.randint(3, 10),
        "num_experts_per_tok": pick.randint(2, min(limit, 6)),
        "norm_topk_prob": pick.random() < 0.6,
    }
    if "num_experts" in hf_config:
        step = pick.choice([1, 2])
        dense = [pick.randrange(layers)] if step == 1 else []
        hf_config |= {"num_experts": experts, "decoder_sparse_step": step, "mlp_only_layers": dense}
        hf_config["tie_word_embeddings"] = pick.random() < 0.5
        return
    hf_config |= {
        "n_routed_experts": experts,
        "n_group": num_groups,
        "topk_group": kept,
        "n_shared_experts": pick.choice([1, 2]),
        "routed_scaling_factor": pick.choice([1.0, 2.446]),
        "first_k_dense_replace": 1
        if "Lite" in hf_config["architectures"][0]
        else pick.randint(0, 1),
    }
    if hf_config["architectures"] == DEEPSEEK_V2["architectures"]:
        hf_config |= {"norm_topk_prob": False, "topk_method": "group_limited_greedy"}
        if num_groups == 1:
            hf_config["topk_method"] = "greedy"
    else:
        hf_config["num_nextn_predict_layers"] = pick.choice([0, 1])


def _gpt_oss(hf_config: dict, pick: random.Random) -> None:
    experts = pick.choice([2, 4, 6, 16])
    hf_config |= {
        "rms_norm_eps": 1e-5,
        "num_local_experts": experts,
        "num_experts_per_tok": pick.randint(2, min(experts, 4)),
        "sliding_window": pick.choice([1, 2, 7, 16, 17, 64, 200]),
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": pick.choice([4.0, 32.0]), "beta_slow": 1.0},
            "beta_fast": pick.choice([4.0, 32.0]),
            "original_max_position_embeddings": pick.choice([32, 64]),
            "truncate": pick.choice([True, False, None]),
        },
    }
