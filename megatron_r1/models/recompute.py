"""What is computed again in the backward pass instead of being kept: settings for Megatron's.

"none" keeps every activation. "selective" drops those of the modules named (Megatron's
recompute_modules). "full" keeps the input of each layer and computes all of the layer again.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.errors import UserError

MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def recompute_fields(recompute: str, modules: Sequence[str], fields: dict) -> dict:
    """TransformerConfig fields; `fields`: those of the model. Raises UserError for a name that
    does not exist and for modules the model lacks."""
    if recompute == "none":
        return {}
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if recompute != "selective":
        raise UserError(f"parallel.recompute={recompute!r} must be none, selective or full")
    latent, experts = "kv_lora_rank" in fields, bool(fields.get("num_moe_experts"))
    lacking = {"mla_up_proj": not latent} | dict.fromkeys(
        ("moe", "moe_act", "shared_experts"), not experts
    )
    for module in modules:
        if module not in MODULES:
            raise UserError(
                f"parallel.recompute_modules: {module!r} is none of {', '.join(MODULES)}"
            )
        if lacking.get(module):
            raise UserError(f"parallel.recompute_modules: this model has no {module!r}; leave it")
    if "moe" in modules and "shared_experts" in modules:
        raise UserError("parallel.recompute_modules: 'moe' includes 'shared_experts'; name one")
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
