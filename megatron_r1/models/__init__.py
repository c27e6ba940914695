"""Models on Megatron-Core, built from Hugging Face configurations. `families` is the table of
architectures, where one made of known parts is a new entry; `hf_config`, `support_checks`,
`attention_fields` and `experts` read `config.json`, `parallel_checks` compares it with the recipe;
`megatron_config` and `build` make Megatron's configuration and a rank's model of it; `memory`
counts their bytes; `layers`, `attention`, `ring_attention`, `length_buckets` and `shared_prefixes`
are what Megatron lacks on a CPU or has wrong; `context_parallel` is the split of tokens over ranks;
`platform`, `patches` and `cpu_patches` prepare a process, with patches of the form that `patching`
has; `gradients`, `fp8` (on GPUs `fp8_checks`) and `routing_replay` are the rules of gradients, FP8
training and routing replay; `weights` is the table of all weights.

Everything but `read_hf_config` is imported at first use, after `models.platform.prepare()`; before
the first model is built, `patches.install()` is called."""

from typing import Any

from r1_grading.base import import_lazily

from megatron_r1.models.hf_config import read_hf_config

_MODULE_BY_NAME = {
    "transformer_config": "megatron_config",
    "build_model": "build",
    "freeze_mtp": "policy_model",
    "lm_head_weight": "policy_model",
    "logits": "policy_model",
    "vocab_shard": "policy_model",
}

__all__ = ["read_hf_config", *_MODULE_BY_NAME]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULE_BY_NAME, name)
