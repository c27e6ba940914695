"""Megatron's configuration of attention and its rotary embedding, from `config.json`. No torch or
Megatron."""

from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import (
    HFConfig,
    is_finite_number,
    model_family,
    require_keys,
    require_values,
)

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
        "attn_factor",  # of DeepSeek-R1-0528-Qwen3-8B; transformers and vLLM do not read it
    ),
}
"""Kind of rotary embedding -> the settings that it has besides rope_type and rope_theta."""


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
    rope = _rope_settings(hf_config)
    return {
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope["partial_rotary_factor"],
        "seq_len_interpolation_factor": _linear_factor(rope),
        "share_embeddings_and_output_weights": bool(hf_config.get("tie_word_embeddings")),
    }


def _linear_factor(rope: dict[str, Any]) -> float | None:
    """Return the number that positions are divided by, or None without such scaling."""
    if rope["rope_type"] != "linear":
        return None
    require_keys(rope, "factor")
    if not isinstance(rope["factor"], float):
        raise UserError(
            f"config.json: factor={rope['factor']!r} of linear must be written with a decimal point"
            f" ({float(rope['factor'])}): vLLM reads no whole number there",
            key="factor",
            cause=Cause.MALFORMED,
        )
    return rope["factor"]


def rope_scaling(hf_config: HFConfig) -> dict[str, Any] | None:
    """Return the arguments of RotaryEmbedding._apply_scaling, or None without such scaling.

    GPTModel takes the factor only and fixes the other three at Llama 3.1's values; config.json may
    have others."""
    if (
        model_family(hf_config).latent_attention
        or (rope := _rope_settings(hf_config))["rope_type"] != "llama3"
    ):
        return None
    require_keys(rope, *_ROPE_KEYS["llama3"])
    return {name: rope[name] for name in _ROPE_KEYS["llama3"]}


def yarn_scaling(hf_config: HFConfig) -> dict[str, Any] | None:
    """Return what `build_model` scales angles by, or None without YaRN; latent attention has it in
    Megatron's own fields."""
    if (
        model_family(hf_config).latent_attention
        or (rope := _rope_settings(hf_config))["rope_type"] != "yarn"
    ):
        return None
    names = ("factor", "rope_theta", "original_max_position_embeddings")
    # vLLM's class of gpt-oss has no default of these.
    require_keys(
        rope,
        *names,
        *(("beta_fast", "beta_slow") if model_family(hf_config).attention_sinks else ()),
    )
    require_values(rope, attention_factor=None, mscale=None, mscale_all_dim=None)
    return {name: rope[name] for name in names} | {
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "truncate": bool(rope.get("truncate", True)),
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
        num_rotated := int(size * _rope_settings(hf_config)["partial_rotary_factor"])
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
        **_latent_rope(hf_config),
    }


def rope_parameters(hf_config: HFConfig) -> dict[str, Any]:
    """Return the rotary settings as one flat dict with `rope_type` and `rope_theta`, and
    `partial_rotary_factor` where `hf_config` has it.

    transformers 5 writes `rope_parameters`; earlier versions `rope_theta` next to `rope_scaling`,
    with the kind in `rope_type` or `type`.

    Raises:
        UserError: two of these disagree.
    """
    new, old = hf_config.get("rope_parameters") or {}, hf_config.get("rope_scaling") or {}
    rope = {**old, **new}
    outer = {name: hf_config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    for name, value in [*old.items(), *outer.items()]:
        if value is not None and rope.setdefault(name, value) not in (value,):
            remedy = "leave one"
            if name in outer and name in new:
                remedy = "transformers and vLLM read the latter: remove the former, if so meant"
            raise UserError(
                f"config.json: {name}={value!r} next to rope_parameters with "
                f"{name}={rope[name]!r}; " + remedy,
                key=name,
                cause=Cause.CONFLICT,
            )
    kind = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or kind or "default"
    rope.setdefault("rope_theta", model_family(hf_config).rope_theta)
    for name, value in rope.items():
        fits = is_finite_number(value) or value is None or type(value) is bool
        if name == "rope_theta":
            fits = is_finite_number(value) and value > 0
        if not fits and name != "rope_type":
            raise UserError(
                f"config.json: {name}={value!r} of the rotary settings must be a number"
                + (" above 0" if name == "rope_theta" else ""),
                key=name,
                cause=Cause.MALFORMED,
            )
    return rope


def _rope_settings(hf_config: HFConfig) -> dict[str, Any]:
    """Return the rotary settings, all of them known.

    Raises:
        UserError: a setting is unknown.
    """
    family, rope = model_family(hf_config), rope_parameters(hf_config)
    kind = rope["rope_type"]
    if kind not in family.rope_types:
        raise UserError(
            f"rope_type={kind!r} in config.json is not supported for "
            f"{hf_config['architectures'][0]}, only {', '.join(family.rope_types)}",
            key="rope_type",
            cause=Cause.UNSUPPORTED,
        )
    known_keys = {"rope_type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    if unknown_settings := {k: v for k, v in rope.items() if k not in known_keys and v is not None}:
        raise UserError(
            f"config.json: {unknown_settings} of the rotary settings is not supported with "
            f"rope_type={kind!r}; remove it if it changes nothing",
            key=min(unknown_settings),
            cause=Cause.UNSUPPORTED,
        )
    if kind != "default" and (rope.get("factor") or 1.0) < 1.0:
        raise UserError(
            f"config.json: factor={rope['factor']!r} of {kind} must be at least 1",
            key="factor",
            cause=Cause.OUT_OF_RANGE,
        )
    part = rope.setdefault("partial_rotary_factor", family.rotary_fraction)
    if not 0 < part <= 1:
        raise UserError(
            f"config.json: partial_rotary_factor={part!r} must be above 0 and at most 1",
            key="partial_rotary_factor",
            cause=Cause.OUT_OF_RANGE,
        )
    if family.rotary_fraction == 1.0:
        require_values(rope, partial_rotary_factor=1.0)
    return rope


def _latent_rope(hf_config: HFConfig) -> dict[str, Any]:
    """Return Megatron's fields of latent attention's rotary embedding, plain or YaRN."""
    rope = _rope_settings(hf_config)
    fields = {"rotary_base": rope["rope_theta"]}
    if rope["rope_type"] == "default":
        # The softmax scale reads the factor whatever the rope_type is (multi_latent_attention.py).
        return {**fields, "rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    require_values(rope, attention_factor=None, truncate=True)
    require_keys(rope, "factor", "original_max_position_embeddings")
    mscale, mscale_all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if (not mscale_all_dim and mscale not in (0.0, 1.0)) or (mscale_all_dim and not mscale):
        raise UserError(
            f"mscale={mscale} with mscale_all_dim={mscale_all_dim} in config.json means different "
            "things to transformers and vLLM; give both or leave both out",
            key="mscale",
            cause=Cause.CONFLICT,
        )
    return {
        **fields,
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": mscale or 1.0,
        "mscale_all_dim": mscale_all_dim,
    }
