"""One RL run around the algorithm: its begin, its steps with what is measured of them, its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from megatron_r1.base.processes import timeline
from megatron_r1.base.processes.stopping import StopRequest
from megatron_r1.config import Config
from megatron_r1.controller.advice import FIRST_STEPS, find_advice
from megatron_r1.controller.policy_engines import PolicyEngines
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.heldout import HeldoutEvaluation
from megatron_r1.controller.rollouts.metrics import mean_of_updates, rollout_metrics
from megatron_r1.controller.rollouts.response_lines import response_lines
from megatron_r1.controller.rollouts.rollout import Rollout
from megatron_r1.controller.run_checkpoints import RunCheckpoints
from megatron_r1.controller.run_recorder import RunRecorder


class RLRun:
    """One RL run in progress. `step` counts rollouts, from 1.

    Args:
        recorder: writes the run's folder: state, metrics, samples and advice.
        stop: says whether the run was asked to stop.
        collector: has the engines sample and the rewards grade.
        engines: samples with the policy's weights, and pushes them.
        policy_trainer: runs the algorithm's passes on the trainer; it has the run's settings.
        heldout: evaluates the policy when that is due."""

    def __init__(
        self,
        recorder: RunRecorder,
        stop: StopRequest,
        collector: RolloutCollector,
        engines: PolicyEngines,
        policy_trainer: PolicyTrainer,
        heldout: HeldoutEvaluation,
    ):
        self.config, self.recorder, self.stop = policy_trainer.run_config, recorder, stop
        self.engines, self.policy_trainer, self.heldout = engines, policy_trainer, heldout
        self.collector = collector
        self.run_checkpoints = RunCheckpoints(
            recorder, policy_trainer.trainer, engines.step_sampler
        )
        self.step = recorder.state.step
        self._meter = StepMeter(self.collector)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[RLRun]:
        """Restore trainer and engines, run the block, which trains, then save the steps since the
        last checkpoint, if the run was asked to stop."""
        try:
            await self.begin()
            yield self
            if self.step != self.recorder.state.step:
                await self.save()
        finally:
            await self.engines.close()

    async def begin(self) -> None:
        """Load the newest checkpoint, connect trainer and engines, and begin to sample."""
        timeline.watch_waiting(asyncio.get_running_loop())
        if self.config.rollout.colocated:
            # A checkpoint, and then the weights in transit, need the engines' memory.
            await self.collector.fleet.sleep()
        await self.run_checkpoints.resume(self.policy_trainer.uses_reference)
        self.step = self.recorder.state.step
        await self.engines.open(self.step)
        if self.step == 0:
            await self.engines.wait_for_probes()
            await self.heldout.run(self.step)
        self.engines.step_sampler.open(self.step + 1)

    def next_step(self) -> Config | None:
        """Go on to the next rollout; return its step's settings, which `rl.schedule` may change, or
        None at the end of the run and when asked to stop."""
        if self.stop.is_requested or self.step >= self.config.run.steps:
            return None
        self.step += 1
        timeline.begin_step(self.step)
        self._meter = StepMeter(self.collector)
        return self.config.at(self.step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` as the run's phase, and measure the seconds spent in it."""
        self.recorder.view.show_phase(name)
        with self._meter.phase(name):
            yield

    async def finish_step(
        self, rollout: Rollout, metrics: dict[str, float], updates: list[dict[str, float]]
    ) -> None:
        """Record the step; evaluate and checkpoint when due.

        Args:
            rollout: what the step was trained on.
            metrics: the metrics of the trainer's passes over the whole rollout.
            updates: the metrics of each mini-batch."""
        # In a thread: 8,192 long responses take 0.3 s.
        rollout_means = await asyncio.to_thread(
            rollout_metrics, rollout, policy_version=self.step - 1
        )
        metrics_row = {
            "step": self.step,
            "optimizer_step": self.recorder.state.optimizer_step,
            **rollout_means,
        }
        metrics_row |= self.engines.metrics()
        metrics_row["trainer/restarts"] = self.policy_trainer.trainer.num_restarts
        metrics_row |= self._meter.metrics() | metrics | mean_of_updates(updates)
        if self.collector.teachers is not None:
            kl_by_source = self.collector.teachers.kl_by_source
            metrics_row |= await asyncio.to_thread(kl_by_source, rollout.groups)
        metrics_row |= self._meter.times(rollout)
        metrics_row["tokens_per_second"] = (
            metrics_row.pop("response_tokens") / metrics_row["time/step"]
        )
        metrics_row["groups/restored"] = self.engines.sampled_step.num_restored
        metrics_row |= await self.recorder.checkpoints.completed_metrics(
            self.policy_trainer.trainer
        )
        if not self.config.rl.keep_sample_log:
            await self.run_checkpoints.prune_samples(self.config.checkpoint.keep)
        records = response_lines(rollout.groups, self.step, "train", self.config.run.log_samples)
        self.recorder.record_step(metrics_row, records)
        if self.step <= FIRST_STEPS:
            # In a thread: it searches the texts of all responses.
            advice = await asyncio.to_thread(find_advice, rollout, self.config.at(self.step))
            self.recorder.advise(self.step, advice)
        if self.heldout.is_due(self.step):
            await self.engines.wait_for_probes()
            await self.heldout.run(self.step)
        is_last = self.step == self.config.run.steps
        if is_last or self.step % self.config.checkpoint.every == 0:
            await self.save()

    async def save(self) -> None:
        """Start a checkpoint of the newest step, once the engines' probes of its weights have
        passed."""
        await self.engines.wait_for_probes()
        async with self.engines.free_for_trainer():
            await self.run_checkpoints.save(self.step, self.engines.sampled_step.sampler_state)


class StepMeter:
    """Measures the seconds and the rewards of a step, from its creation on."""

    def __init__(self, collector: RolloutCollector):
        self._teachers = collector.teachers
        self._seconds: dict[str, float] = {}
        self._meter = collector.pool.start_meter()
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds spent in phase `name`."""
        start = time.perf_counter()
        with timeline.span(f"phase/{name}"):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the reward workers, and of the teachers if there are any."""
        metrics = dict(self._meter.read())
        if self._teachers is not None:
            numbers = self._teachers.metrics().items()
            metrics |= {f"teacher/{name}": value for name, value in numbers}
        return metrics

    def times(self, rollout: Rollout) -> dict[str, float]:
        """Return the seconds of each part of the step."""
        times = {
            "time/rollout": rollout.rollout_seconds,
            "time/wait": self._seconds["rollout"],
            "time/reward": rollout.reward_seconds,
            "time/train": self._seconds["train"],
            "time/push": self._seconds["push"],
            "time/step": time.perf_counter() - self._start,
        }
        if self._teachers is not None:
            times["time/teacher"] = rollout.teacher_seconds
        return times
