"""Measures how far one trainer rank without parallelism, on the weights before a step, is from the
step's logged log-probabilities and from those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from megatron_r1.base.errors import TrainerError
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.server import gpu
from megatron_r1.models.memory import parameter_bytes
from megatron_r1.trainer.operations import CheckpointOperations, ModelOperations
from megatron_r1.trainer.training_sample import Sample
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.record.recorded_step import RecordedStep

LAYOUT_KEYS = (
    "processes",
    "tensor",
    "pipeline",
    "expert",
    "context",
    "sequence",
    "expert_tensor",
    "virtual_pipeline",
    "pipeline_layout",
    "dispatcher",
    "overlap_expert_exchange",
    "overlap_param_gather",
    "offload_between_phases",
    "offload_folder",
)
"""The settings of `parallel` that the rank has at their defaults; the others are the run's."""
METRIC = "logprob_diff/mean"


class RankDistances(NamedTuple):
    """Mean |distance| of the rank's log-probabilities of the tokens that are trained on, in nats.

    Attributes:
        engine: from the engine's in the log.
        transformers: from transformers'."""

    engine: float
    transformers: float


def layout_text(parallel: ParallelConfig) -> str:
    """Return the settings of a run's layout that one rank does not have; "" for one rank."""
    changed_settings = parallel.model_dump(
        include={*LAYOUT_KEYS} - {"offload_folder"}, exclude_defaults=True
    )
    return ", ".join(f"parallel.{key}: {value}" for key, value in changed_settings.items())


def check_rank(step: RecordedStep, num_parameters: int, free_bytes: int) -> None:
    """Raise CannotRecompute where one rank cannot hold the trainer's state.

    Args:
        step: what the run recorded of it.
        num_parameters: the number of the policy's weights.
        free_bytes: the memory of the host that a rank on a CPU may take."""
    if gpu.is_usable():  # whose memory the rank finds short itself
        return
    num_bytes = num_parameters * parameter_bytes(step.run_config.model.dtype).total
    if num_bytes > free_bytes:
        raise CannotRecompute(
            f"one trainer rank needs {num_bytes / 1e9:.0f} GB for weights, gradients and "
            f"optimizer, {free_bytes / 1e9:.0f} GB are free"
        )


async def measure_distances(
    step: RecordedStep, logprobs: Sequence[np.ndarray], logs: Path
) -> RankDistances:
    """Start one rank, load the weights before the step, and return its distances.

    Args:
        step: what the run recorded of it.
        logprobs: transformers' log-probabilities of the sampled tokens of each of the step's
            sequences.
        logs: the folder of the rank's log.

    Raises:
        CannotRecompute: the rank fails.
        UserError: the checkpoint is damaged, or settings do not fit one rank."""
    samples = list(chain.from_iterable(training_samples(step.groups, step.advantages)))
    transformers_samples = [
        _with_logprobs(sample, values) for sample, values in zip(samples, logprobs, strict=True)
    ]
    trainer = TrainerClient(_single_rank_config(step), logs)
    try:
        trainer.launch()
        await trainer.connect()
        if step.step > 1:
            await trainer.call(
                CheckpointOperations.load_checkpoint,
                folder=str(step.checkpoint_before),
                with_reference=False,
            )
        return RankDistances(
            await _measure_logprob_distance(trainer, samples, step.config.rollout.temperature),
            await _measure_logprob_distance(
                trainer, transformers_samples, step.config.rollout.temperature
            ),
        )
    except TrainerError as error:
        raise CannotRecompute(f"the trainer rank: {error}") from error
    finally:
        await trainer.close()


def _single_rank_config(step: RecordedStep) -> Config:
    """Return the settings of the rank."""
    defaults = ParallelConfig()
    return step.run_config.with_changes(
        parallel={key: getattr(defaults, key) for key in LAYOUT_KEYS},
        model={"path": str(step.model)},
    )


async def _measure_logprob_distance(
    trainer: TrainerClient, samples: list[Sample], temperature: float
) -> float:
    """Return the mean |distance| of the rank's log-probabilities from those of samples, over the
    samples that are trained on."""
    await trainer.load([[sample for sample in samples if sample.is_trained]])
    await trainer.call(
        ModelOperations.compute_logprobs,
        temperature=temperature,
        with_reference=False,
        with_first_minibatch=True,
    )
    return (await trainer.call(ModelOperations.measure_logprob_diff))[METRIC]


def _with_logprobs(sample: Sample, logprobs: np.ndarray) -> Sample:
    """Return a sample with other log-probabilities in place of the engine's."""
    num_tokens = len(sample) - sample.prompt_length
    values = np.zeros(num_tokens, np.float32)
    values[np.frombuffer(sample.is_sampled, bool) if sample.is_sampled else slice(None)] = logprobs
    return msgspec.structs.replace(sample, rollout_logprobs=values.tobytes())
