"""One optimizer step on a batch of examples, and its line of metrics: the step of `sft` and of
`reward-model`."""

from __future__ import annotations

import time

from megatron_r1.config import Config
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder
from megatron_r1.training.schedule import learning_rate
from megatron_r1.training.wire import Sample


async def supervised_step(
    config: Config,
    recorder: Recorder,
    trainer: TrainerClient,
    sampler: EpochSampler,
    batch: list[Sample],
    loss: str,
    unit: int = 1,
) -> None:
    """Train on `batch`, which was drawn from `sampler`, and count it in the recorder's state.

    loss: at "module:function"; unit: as `TrainerClient.load`.
    """
    state, began = recorder.state, time.perf_counter()
    state.step += 1
    state.optimizer_step += 1
    rate = learning_rate(config.optimizer, state.step, config.run.steps)
    metrics = await trainer.load([batch], unit=unit)
    metrics |= await trainer.update(0, loss, {}, rate)
    seconds = time.perf_counter() - began
    timing = {"time/train": seconds, "time/step": seconds}
    timing["tokens_per_second"] = sum(len(sample) for sample in batch) / seconds
    metrics["trainer/restarts"] = trainer.num_restarts
    metrics |= await recorder.checkpoints.completed(trainer)
    recorder.step({"step": state.step, **metrics, "learning_rate": rate, **timing}, [])
    state.sampler = sampler.state_dict()
