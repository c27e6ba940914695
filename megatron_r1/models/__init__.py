"""Models on Megatron-Core, built from Hugging Face configurations.

    hf_config.py, routing_shape.py, pipeline_stages.py   config.json and layouts; no torch
    deepseek_v3.py, llama.py, qwen2.py                   one architecture each: its config fields
    config.py, build.py                                  Megatron's configuration, and the model
    policy_model.py, score_model.py                      the last stage: hidden states or scores
    layers.py, attention.py                              layers that Megatron lacks on a CPU
    rotary.py, context.py                                packed batches, context parallelism
    replay.py, fp8/                                      routing replay, FP8

A new architecture is one file here, one table in weights/ and a line in hf_config.py. Everything
but `read_hf_config` is imported at first use, after `megatron_r1.platform.prepare()`."""

from typing import Any

from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.processes.imports import import_lazily

_HOME = {
    "transformer_config": "config",
    "build_model": "build",
    "freeze_mtp": "build",
    "lm_head_weight": "policy_model",
    "logits": "policy_model",
    "vocab_shard": "policy_model",
}

__all__ = ["read_hf_config", *_HOME]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _HOME, name)
