"""Megatron's configuration of attention, from `config.json`; that of its rotary embedding comes
from `rotary_fields`. No torch or Megatron."""

from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig, model_family, require_keys, require_values
from megatron_r1.models.rotary_fields import latent_rope, linear_factor, rope_settings

KEY_VALUE_HEADS = "num_key_value_heads"


def attention_fields(hf_config: HFConfig) -> dict[str, Any]:
    """Return Megatron's fields of the attention; UserError if it is not supported."""
    family, layers = model_family(hf_config), hf_config.get("layer_types")
    kinds = ("sliding_attention", "full_attention")
    expected_kinds = [
        kinds[not family.sliding_windows or index % 2]
        for index in range(hf_config["num_hidden_layers"])
    ]
    if layers is not None and layers != expected_kinds:
        kind_names = " and ".join(repr(kind) for kind in dict.fromkeys(expected_kinds))
        raise UserError(
            f"config.json: layer_types={layers} is not supported for "
            f"{hf_config['architectures'][0]}, only {kind_names} in turn",
            key="layer_types",
            cause=Cause.UNSUPPORTED,
        )
    fields = _latent_fields(hf_config) if family.latent_attention else _grouped_query(hf_config)
    if family.attention_sinks:
        fields["softmax_type"] = "learnable"
    if family.sliding_windows:
        # Megatron counts the keys before a query's own.
        fields["window_size"] = (hf_config["sliding_window"] - 1, 0)
        fields["window_attn_skip_freq"] = [int(kind == kinds[0]) for kind in expected_kinds]
    return fields


def model_arguments(hf_config: HFConfig) -> dict[str, Any]:
    """Return the arguments of GPTModel besides the configuration."""
    if model_family(hf_config).latent_attention:
        return {"position_embedding_type": "rope"}
    rope = rope_settings(hf_config)
    return {
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope["partial_rotary_factor"],
        "seq_len_interpolation_factor": linear_factor(rope),
        "share_embeddings_and_output_weights": bool(hf_config.get("tie_word_embeddings")),
    }


def has_qkv_bias(hf_config: HFConfig) -> bool:
    """Return whether query, key and value have biases."""
    return _config_flag(hf_config, model_family(hf_config).qkv_bias)


def has_qk_norm(hf_config: HFConfig) -> bool:
    """Return whether each head's query and key are normalized."""
    return _config_flag(hf_config, model_family(hf_config).qk_norm)


def attention_divisions(
    hf_config: HFConfig, transformer_engine: bool
) -> list[tuple[str, int, str]]:
    """Return (field, its value, the key of `parallel` that must divide it) triples; of key-value
    heads it may be a multiple, too (`parallel_checks`)."""
    heads = hf_config["num_attention_heads"]
    rules = [("num_attention_heads", heads, "tensor")]
    if not model_family(hf_config).latent_attention:
        groups = hf_config.get("num_key_value_heads") or heads
        size = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
        rows = "(num_attention_heads + 2 x num_key_value_heads) x head_dim"
        return [
            *rules,
            (KEY_VALUE_HEADS, groups, "tensor"),
            (rows, (heads + 2 * groups) * size, "tensor"),
        ]
    if not transformer_engine:
        # MLASelfAttention creates column-parallel down-projections, which LatentAttention replaces.
        latent_size = hf_config["kv_lora_rank"] + hf_config["qk_rope_head_dim"]
        rules.append(("kv_lora_rank + qk_rope_head_dim", latent_size, "tensor"))
        if hf_config.get("q_lora_rank"):
            rules.append(("q_lora_rank", hf_config["q_lora_rank"], "tensor"))
    return rules


def _config_flag(hf_config: HFConfig, value: bool | str) -> bool:
    return bool(hf_config.get(value)) if isinstance(value, str) else value


def _grouped_query(hf_config: HFConfig) -> dict[str, Any]:
    num_heads = hf_config["num_attention_heads"]
    groups = hf_config.get(KEY_VALUE_HEADS) or num_heads
    size = hf_config.get("head_dim") or hf_config["hidden_size"] // num_heads
    if num_heads % groups:
        raise UserError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={groups}",
            key="num_attention_heads",
            cause=Cause.INDIVISIBLE,
        )
    if (
        num_rotated := int(size * rope_settings(hf_config)["partial_rotary_factor"])
    ) % 2 or not num_rotated:
        raise UserError(
            f"config.json: {num_rotated} numbers of a head are rotated (head_dim, or hidden_size / "
            "num_attention_heads, x partial_rotary_factor), which must be pairs",
            key="partial_rotary_factor",
            cause=Cause.OUT_OF_RANGE,
        )
    return {
        "num_query_groups": groups,
        "kv_channels": size,
        "add_qkv_bias": has_qkv_bias(hf_config),
        "qk_layernorm": has_qk_norm(hf_config),
    }


def _latent_fields(hf_config: HFConfig) -> dict[str, Any]:
    require_keys(hf_config, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    require_keys(hf_config, KEY_VALUE_HEADS)  # transformers' default is DeepSeek-V3's 128
    if "q_lora_rank" not in hf_config:
        raise UserError(
            "config.json lacks q_lora_rank, whose default in transformers is not null; add null for"
            " a model with q_proj, else the size",
            key="q_lora_rank",
            cause=Cause.MISSING,
        )
    nope, rope = hf_config["qk_nope_head_dim"], hf_config["qk_rope_head_dim"]
    require_values(
        hf_config, num_key_value_heads=hf_config["num_attention_heads"], qk_head_dim=nope + rope
    )
    if hf_config.get("head_dim") not in (None, rope, nope + rope):
        raise UserError(
            f"config.json: head_dim={hf_config['head_dim']} is neither qk_rope_head_dim={rope} nor "
            f"qk_nope_head_dim + qk_rope_head_dim={nope + rope}; remove it",
            key="head_dim",
            cause=Cause.CONFLICT,
        )
    return {
        "kv_channels": nope + rope,
        "q_lora_rank": hf_config.get("q_lora_rank"),
        "kv_lora_rank": hf_config["kv_lora_rank"],
        "qk_head_dim": nope,
        "qk_pos_emb_head_dim": rope,
        "v_head_dim": hf_config["v_head_dim"],
        "qk_layernorm": True,
        **latent_rope(hf_config),
    }
