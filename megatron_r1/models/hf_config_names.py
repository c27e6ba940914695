"""The keys under which a `config.json` has a setting: one for each here, and those that
transformers and vLLM read."""

from __future__ import annotations

from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.families import FAMILIES
from megatron_r1.models.hf_config import (
    ARCHITECTURES,
    EXPERT_SIZE_KEY,
    HFConfig,
    model_family,
)

# transformers 5 reads both names of each of these and may write either.
_ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
}


def resolve_aliases(hf_config: HFConfig) -> dict[str, Any]:
    """Return `hf_config` with one name for each setting; UserError where two names have two
    values."""
    hf_config = dict(hf_config)
    for alias, name in _ALIASES.items():
        if alias not in hf_config:
            continue
        value = hf_config.pop(alias)
        if hf_config.setdefault(name, value) != value:
            raise UserError(
                f"config.json: {alias}={value!r} and {name}={hf_config[name]!r} mean the same; "
                "leave one",
                key=alias,
                cause=Cause.CONFLICT,
            )
    for family in (
        ARCHITECTURES[n] for n in hf_config.get("architectures") or [] if n in ARCHITECTURES
    ):
        if FAMILIES[family].router_score and (
            size := hf_config.get(FAMILIES[family].expert_size_key)
        ):
            hf_config.setdefault(EXPERT_SIZE_KEY, size)
    return hf_config


def published_names(hf_config: HFConfig) -> HFConfig:
    """Return `hf_config` with the names that transformers' and vLLM's classes of its architecture
    read."""
    name, family = "n_routed_experts", model_family(hf_config)
    if name not in hf_config or family.router_score != "softmax" or family.latent_attention:
        return hf_config
    hf_config = {("num_experts" if key == name else key): value for key, value in hf_config.items()}
    if family.expert_size_key != EXPERT_SIZE_KEY:
        hf_config[family.expert_size_key] = hf_config.pop(EXPERT_SIZE_KEY)
    return hf_config
