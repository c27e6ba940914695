"""Models on Megatron-Core, built from Hugging Face configurations.

Only `read_hf_config` is free of torch and Megatron; the rest is imported when first asked for,
after `megatron_r1.platform.prepare()`.
"""

from megatron_r1.models.hf_config import read_hf_config

__all__ = [
    "build_model",
    "freeze_mtp",
    "lm_head_weight",
    "logits",
    "read_hf_config",
    "transformer_config",
    "vocab_shard",
]

_HOME = {
    "transformer_config": "config",
    "build_model": "build",
    "freeze_mtp": "build",
    "lm_head_weight": "policy_model",
    "logits": "policy_model",
    "vocab_shard": "policy_model",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
