"""Computes log-probabilities of a step's tokens by an engine that is started for them, with the
settings of the run's engines, on the weights before the step."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from megatron_r1.base.transports import BACKEND_PREFIX
from megatron_r1.config import Config
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.cpu_kernel_checks import check_cpu_kernels
from megatron_r1.engines.server.errors import EngineError, with_log_excerpt
from megatron_r1.engines.server.model_config import max_positions
from megatron_r1.engines.server.recipe_checks import check_engines, check_local_engines
from megatron_r1.engines.server.recipe_settings import engine_settings, fleet_settings
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config_file import load_raw_hf_config
from megatron_r1.models.memory import engine_bytes
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.record.step_sequences import TokenSequence

ROLE = "rerun"


def check_engine(step: RecordedStep, num_parameters: int, free_bytes: int) -> None:
    """Raise CannotRecompute where no fresh engine can compute what the run's engines did.

    Args:
        step: what the run recorded of it.
        num_parameters: the number of the policy's weights.
        free_bytes: the memory of the host that an engine on CPUs may take."""
    config = step.run_config
    reasons = (
        (find_spec("vllm") is None, "vllm is not installed in this environment"),
        ("quantization_config" in step.hf_config, "the weights in model.path are quantized"),
        (config.push.fp8, "push.fp8: the engines' weights are quantized on their way"),
        (
            config.push.adapter_only,
            "push.adapter_only: vLLM adds the adapters itself, and a fresh engine has them merged",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise CannotRecompute(reason)
    if gpu.is_usable():
        return
    num_bytes = engine_bytes(num_parameters, config.rollout.dtype, receives=False)
    num_bytes += config.rollout.kv_cache_gib * 2**30
    if num_bytes > free_bytes:
        raise CannotRecompute(
            f"an engine needs {num_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
        )


async def compute_engine_logprobs(
    config: Config, folder: Path, sequences: Sequence[TokenSequence], logs: Path
) -> list[np.ndarray]:
    """Return a fresh engine's log-probabilities of the sampled tokens of each sequence, float32, at
    temperature 1 over the whole vocabulary; NaN of those beyond the engine's positions.

    Args:
        config: the run's settings.
        folder: the Hugging Face folder with the weights.
        sequences: those whose tokens it computes.
        logs: the folder of the engine's log.

    Raises:
        CannotRecompute: the engine does not start, or fails.
        UserError: settings with which no engine can serve the model."""
    _check_settings(config, folder)
    length = min(config.rollout.max_model_len or max_positions(folder), max_positions(folder))
    # The engines of the run on one host, one engine of them; drafts change nothing of given tokens.
    settings = engine_settings(config.rollout) | {"speculative": None}
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(
            EngineFleet(
                1,
                logs,
                role=ROLE,
                device=gpu.engine_device(),
                weight_transfer_backend=BACKEND_PREFIX + config.push.transport,
                return_routing=config.rl.routing_replay,
                return_sampling_mask=config.rollout.uses_sampling_mask,
                # vLLM samples one token after the given ones.
                max_model_len=length + 1,
                extra_env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
                **fleet_settings(config.rollout) | {"max_restarts": 0},
                **settings,
            )
        )
        try:
            await fleet.start(folder)
            replies = await asyncio.gather(
                *(
                    fleet.compute_logprobs(_fitting_token_ids(sequence, length), 1)
                    for sequence in sequences
                )
            )
        except EngineError as error:
            reason = with_log_excerpt(error, logs, f"{ROLE}-0")
            raise CannotRecompute(f"the fresh engine: {reason}") from error
    return [
        _sampled_logprobs(sequence, reply)
        for sequence, reply in zip(sequences, replies, strict=True)
    ]


def _check_settings(config: Config, folder: Path) -> None:
    """Raise UserError for settings with which no engine on this host can serve the model."""
    hf_config = load_raw_hf_config(folder)
    check_engines(config, hf_config)
    check_local_engines(config.rollout)
    check_cpu_kernels(config.rollout, hf_config)
    check_arguments(config.rollout, "rollout")


def _fitting_token_ids(sequence: TokenSequence, length: int) -> list[int]:
    """Return the tokens of a sequence that fit into the engine's positions."""
    return sequence.token_ids[:length].tolist()


def _sampled_logprobs(sequence: TokenSequence, reply: array[float]) -> np.ndarray:
    """Return the log-probabilities of a sequence's sampled tokens."""
    logprobs = np.full(len(sequence.token_ids), np.nan, np.float32)
    logprobs[1 : 1 + len(reply)] = reply
    return logprobs[sequence.is_sampled]
