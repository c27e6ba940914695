"""The settings that engines and their fleet take from a recipe's `rollout` or `teacher`, and the
context length that the model allows them."""

import os
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config, RolloutConfig, TeacherConfig
from megatron_r1.config.engine import LAYOUT
from megatron_r1.config.rollout import SpeculativeConfig
from megatron_r1.models.hf_config import language_settings, load_config

MEMORY_KEYS = {"kv_cache_gib", "kv_block_tokens", "gpu_memory", "plain_matrices"}
ENGINE_KEYS = LAYOUT | MEMORY_KEYS | {"dtype", "max_num_seqs", "vllm"}
SUPERVISION_KEYS = {
    "start_timeout_seconds",
    "request_timeout_seconds",
    "max_restarts",
    "unresponsive_seconds",
}
"""Keys that `rollout` and `teacher` both have."""


def fleet_settings(engines: RolloutConfig | TeacherConfig) -> dict[str, Any]:
    """Return the arguments of `RolloutFleet` that a recipe sets."""
    return engines.model_dump(include=SUPERVISION_KEYS)


def engine_settings(engines: RolloutConfig | TeacherConfig) -> dict[str, Any]:
    """Return the `EngineSettings` that a recipe sets, the same for every job of its engines."""
    # The server that takes requests, and the controller, need a core besides: with 2 threads on 2
    # cores a rollout of 256 short responses takes 1.14 s, with 1 thread 0.92 s.
    threads = engines.threads or max(1, min(2, (os.cpu_count() or 1) - 1))
    own = engines.model_dump(include=ENGINE_KEYS) | {"num_threads": threads}
    if isinstance(engines, RolloutConfig):  # a teacher only scores
        own["speculative"] = speculative_settings(engines.speculative)
        own["redundant_experts"] = engines.redundant_experts
    return own


def speculative_settings(speculative: SpeculativeConfig) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config`, None without speculation."""
    if speculative.method == "none":
        return None
    return {"method": speculative.method, "num_speculative_tokens": speculative.tokens}


def max_model_len(config: Config) -> int:
    """Return `rollout.max_model_len`, or the model's own limit, in tokens.

    The model may be any that vLLM supports, also one that cannot be trained here.

    Raises:
        UserError: the model has fewer positions, or responses would leave no room for a prompt.
    """
    limit = max_positions(config.model.path)
    length = config.rollout.max_model_len or limit
    if length > limit:
        raise UserError(
            f"rollout.max_model_len: {length} is more than the model's {limit} positions "
            f"({config.model.path}/config.json: max_position_embeddings)",
            key="rollout.max_model_len",
            cause=Cause.TOO_LARGE,
        )
    # Engines are sized once, for the longest responses of rl.schedule.
    longest = max(phase.rollout.max_response_tokens for _, phase in config.phases())
    if longest >= length:
        raise UserError(
            f"rollout.max_response_tokens: {longest} leaves no room for "
            f"a prompt within {length} tokens; lower it"
            + (f", or raise rollout.max_model_len (at most {limit})" if length < limit else ""),
            key="rollout.max_response_tokens",
            cause=Cause.TOO_LARGE,
        )
    return length


def max_positions(folder: str | Path, key: str = "model.path") -> int:
    """Return max_position_embeddings of a model, its longest context in tokens.

    Args:
        folder: the model's folder.
        key: the recipe's setting that names the folder, for errors.

    Raises:
        UserError: config.json is missing or malformed, or has no such number.
    """
    hf = load_config(folder, key)
    try:
        return int(language_settings(hf)["max_position_embeddings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}/config.json: no max_position_embeddings can be read ({error!r})",
            key="max_position_embeddings",
            cause=Cause.MISSING,
        ) from error


def vocab_size(model: Path) -> int | None:
    """Return the vocabulary's size in a model's config.json, or None where it is not readable."""
    try:
        return language_settings(load_config(model)).get("vocab_size")
    except (UserError, AttributeError):
        return None  # the server's own error is more precise
