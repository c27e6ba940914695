"""The settings of a recipe that engines and their fleet take."""

import os
from typing import Any

from megatron_r1.config import RolloutConfig, TeacherConfig
from megatron_r1.config.engines import LAYOUT, SpeculativeConfig

MEMORY = {"kv_cache_gib", "kv_block_tokens", "gpu_memory", "plain_matrices"}
ENGINE = LAYOUT | MEMORY | {"dtype", "max_num_seqs"}
SUPERVISION = {
    "start_timeout_seconds",
    "request_timeout_seconds",
    "max_restarts",
    "unresponsive_seconds",
}
"""Keys that `rollout` and `teacher` both have."""


def fleet_settings(engines: RolloutConfig | TeacherConfig) -> dict[str, Any]:
    """Return the arguments of `RolloutFleet` that a recipe sets."""
    return engines.model_dump(include=SUPERVISION)


def engine_settings(engines: RolloutConfig | TeacherConfig) -> dict[str, Any]:
    """Return the `EngineSettings` that a recipe sets, the same for every job of its engines."""
    # The server that takes requests, and the controller, need a core besides: with 2 threads on 2
    # cores a rollout of 256 short responses takes 1.14 s, with 1 thread 0.92 s.
    threads = engines.threads or max(1, min(2, (os.cpu_count() or 1) - 1))
    own = engines.model_dump(include=ENGINE) | {"num_threads": threads}
    if isinstance(engines, RolloutConfig):  # a teacher only scores
        own["speculative"] = speculative_settings(engines.speculative)
    return own


def speculative_settings(speculative: SpeculativeConfig) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config`, None without speculation."""
    if speculative.method == "none":
        return None
    return {"method": speculative.method, "num_speculative_tokens": speculative.tokens}
