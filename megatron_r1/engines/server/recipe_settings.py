"""What a recipe's `rollout` or `teacher` sets of engines and of their fleet."""

import os
from typing import Any

from megatron_r1.config import RolloutConfig
from megatron_r1.config.engine import LAYOUT_KEYS
from megatron_r1.config.rollout import SpeculativeConfig
from megatron_r1.config.teacher import TeacherEngineConfig

MEMORY_KEYS = {"kv_cache_gib", "kv_block_tokens", "gpu_memory", "plain_matrices"}
ENGINE_KEYS = LAYOUT_KEYS | MEMORY_KEYS | {"dtype", "max_num_seqs", "vllm"}
SUPERVISION_KEYS = {
    "start_timeout_seconds",
    "request_timeout_seconds",
    "max_restarts",
    "unresponsive_seconds",
}
"""Keys that `rollout` and `teacher` both have."""


def fleet_settings(engines: RolloutConfig | TeacherEngineConfig) -> dict[str, Any]:
    """Return the arguments of `EngineFleet` that a recipe sets."""
    return engines.model_dump(include=SUPERVISION_KEYS)


def engine_settings(engines: RolloutConfig | TeacherEngineConfig) -> dict[str, Any]:
    """Return the `EngineSettings` that a recipe sets, the same for every job of its engines."""
    # The server that takes requests, and the controller, need a core besides: with 2 threads on 2
    # cores a rollout of 256 short responses takes 1.14 s, with 1 thread 0.92 s.
    threads = engines.threads or max(1, min(2, (os.cpu_count() or 1) - 1))
    settings = engines.model_dump(include=ENGINE_KEYS) | {"num_threads": threads}
    if isinstance(engines, RolloutConfig):  # a teacher samples nothing
        settings["speculative"] = speculative_settings(engines.speculative)
        settings["redundant_experts"] = engines.redundant_experts
    return settings


def speculative_settings(speculative: SpeculativeConfig) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config`, None without speculation."""
    if speculative.method == "none":
        return None
    return {"method": speculative.method, "num_speculative_tokens": speculative.tokens}
