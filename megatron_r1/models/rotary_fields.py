"""The rotary embedding and its scaling, from `config.json`: plain, linear, of Llama 3 and YaRN, and
that of latent attention. No torch or Megatron."""

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


def linear_factor(rope: dict[str, Any]) -> float | None:
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
        or (rope := rope_settings(hf_config))["rope_type"] != "llama3"
    ):
        return None
    require_keys(rope, *_ROPE_KEYS["llama3"])
    return {name: rope[name] for name in _ROPE_KEYS["llama3"]}


def yarn_scaling(hf_config: HFConfig) -> dict[str, Any] | None:
    """Return what `build_model` scales angles by, or None without YaRN; latent attention has it in
    Megatron's own fields."""
    if (
        model_family(hf_config).latent_attention
        or (rope := rope_settings(hf_config))["rope_type"] != "yarn"
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


def rope_settings(hf_config: HFConfig) -> dict[str, Any]:
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


def latent_rope(hf_config: HFConfig) -> dict[str, Any]:
    """Return Megatron's fields of latent attention's rotary embedding, plain or YaRN."""
    rope = rope_settings(hf_config)
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
