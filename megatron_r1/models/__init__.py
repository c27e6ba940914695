"""Models on Megatron-Core, built from Hugging Face configurations.

    families.py                                          the table of architectures
    hf_config.py, config_keys.py, supported.py           config.json, and what of it is refused
    attention_fields.py, expert_fields.py                config.json to Megatron's configuration
    memory.py                                            bytes of parameters, activations, caches
    quantization.py                                      which quantized checkpoints can be read
    routing_shape.py, pipeline_stages.py                 layouts (the files above import no torch)
    config.py, acceleration.py, build.py                 Megatron's configuration, the choice of
                                                         implementations, and the model
    patches.py                                           what is replaced in Megatron
    gradients.py                                         which ranks sum which gradient
    policy_model.py, score_model.py                      the last stage: hidden states or scores
    layers.py, attention.py, offset_attention.py         layers that Megatron lacks on a CPU
    specs.py                                             each layer's modules
    by_transformers.py                                   transformers' model, for comparisons
    rotary.py, buckets.py, prefixes.py                   packed batches, prompts computed once
    context.py, ring_attention.py                        context parallelism
    routing.py, replay.py, fp8/                          choice of experts, routing replay, FP8

A new architecture made of known parts is one entry of `families.FAMILIES`. Everything but
`read_hf_config` is imported at first use, after `megatron_r1.models.platform.prepare()`; before the
first model is built, `patches.install()` is called."""

from typing import Any

from r1_grading.base import import_lazily

from megatron_r1.models.hf_config import read_hf_config

_HOME = {
    "transformer_config": "config",
    "build_model": "build",
    "freeze_mtp": "build",
    "lm_head_weight": "build",
    "logits": "build",
    "vocab_shard": "build",
}

__all__ = ["read_hf_config", *_HOME]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _HOME, name)
