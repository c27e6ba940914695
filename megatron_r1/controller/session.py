"""One RL run around the algorithm: its begin and end, its steps, its folder and checkpoints
(`Session`), and its engines (`PolicyEngines`), which sample each step's rollout and get each
step's weights.

What an engine computes from pushed weights counts only when it has proved that it computes what
the trainer does; it does so while it samples the next rollout."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

from r1_grading.pool import LEVELS

from megatron_r1.base.processes import timeline
from megatron_r1.base.processes.stopping import StopRequest
from megatron_r1.config import Config
from megatron_r1.controller.advice import FIRST_STEPS, advice
from megatron_r1.controller.delivery.bridge import WeightBridge
from megatron_r1.controller.rollouts.heldout import HeldoutEvaluation
from megatron_r1.controller.rollouts.metrics import (
    StepRecord,
    mean_of_updates,
    rollout_metrics,
    sample_records,
)
from megatron_r1.controller.rollouts.rollout import Rollout
from megatron_r1.controller.rollouts.step_sampler import StepRollout, StepSampler
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.controller.trainer_calls.recorder import Recorder
from megatron_r1.controller.trainer_passes import TrainerPasses
from megatron_r1.engines.fleet.engine import AcceptanceMeter
from megatron_r1.trainer.checkpoints.finding import complete_checkpoints, step_of
from megatron_r1.trainer.operations import ModelOperations


class PolicyEngines:
    """Samples with the policy's weights and pushes them; `bridge` connects trainer and engines."""

    def __init__(self, trainer: TrainerClient, bridge: WeightBridge, sampler: StepSampler):
        self.trainer, self.bridge, self.sampler = trainer, bridge, sampler
        self._rollout_config = sampler.config.rollout
        self._taken: StepRollout | None = None
        self._acceptance = AcceptanceMeter()
        self._push_metrics: dict[str, float] = {}
        self._probe_metrics: dict[str, float] = {}
        """Of the push before, whose weights the step's rollout is sampled from."""
        self._draft_metrics: dict[str, float] = {}

    async def open(self, version: int) -> None:
        """Connect trainer and engines, and push the weights that the trainer begins with."""
        async with self.updating():
            await self.bridge.open()
            await self.push(version)

    def updating(self) -> AbstractAsyncContextManager[None]:
        """Keep engines from joining while the block changes the trainer's weights and pushes them:
        an engine that joined would get weights between two versions."""
        return self.bridge.updating()

    async def rollout(self, step: int) -> Rollout:
        """Return the rollout of `step`, which may have begun before."""
        self.sampler.begin(step)
        await self.prove()  # while they sample
        self._taken = await self.sampler.take(step)
        if self._rollout_config.speculative.method != "none":
            self._draft_metrics = await self._acceptance.read(self.sampler.collector.fleet.engines)
        return self._taken.rollout

    async def push(self, version: int) -> None:
        """Send the trainer's weights to every engine, as `version`; what these compute counts once
        `prove` has returned. Call it in a block of `updating`."""
        if self._rollout_config.colocated:
            await self.trainer.call(ModelOperations.yield_memory)
        self._push_metrics = await self.bridge.push(version)
        self.sampler.pushed(version)

    async def prove(self) -> None:
        """Wait until the engines have answered the probes of the last push. Raises EngineError if
        one computes something else than the trainer."""
        self._probe_metrics = await self.bridge.proven()
        self.sampler.proven()

    @property
    def taken(self) -> StepRollout:
        """The newest step's rollout, with the state of the sampler after it."""
        assert self._taken is not None, "rollout() comes first"
        return self._taken

    def metrics(self) -> dict[str, float]:
        """Return the numbers of engines and pushes."""
        return {
            **self.sampler.collector.fleet.metrics(),
            **self._push_metrics,
            **self._probe_metrics,
            **self._draft_metrics,
        }

    async def close(self) -> None:
        """Release the engines that wait for weights, and cancel what is being sampled."""
        self.bridge.close()
        await self.sampler.close()


class Session:
    """One RL run in progress. `step` counts rollouts, from 1; `state.optimizer_step` counts updates
    of the policy."""

    def __init__(
        self,
        recorder: Recorder,
        stop: StopRequest,
        engines: PolicyEngines,
        passes: TrainerPasses,
        heldout: HeldoutEvaluation,
    ):
        self.config, self.state = passes.run_config, recorder.state
        self.recorder, self.stop = recorder, stop
        self.engines, self.passes, self.heldout = engines, passes, heldout
        self.trainer, self.collector = passes.trainer, engines.sampler.collector
        self.step = self.state.step
        self._record = StepRecord(self.collector)
        self._rewards_before: Counter[str] = Counter()

    async def begin(self) -> None:
        """Put trainer and engines where the run was left, or at its beginning."""
        timeline.watch_waiting(asyncio.get_running_loop())
        if self.config.rollout.colocated:
            # A checkpoint, and then the weights in transit, need the engines' memory.
            await self.collector.fleet.sleep()
        if self.recorder.resumed:
            await self._resume()
        elif self.passes.uses_reference:
            await self.trainer.call(ModelOperations.keep_reference)
        # The pool may be older than this session: its counts until now are not of this session.
        self._rewards_before.subtract(self._num_rewards())
        await self.engines.open(self.step)
        if self.step == 0:
            await self.engines.prove()
            await self.heldout.run(self.step)
        self.engines.sampler.start(self.step + 1)

    def next_step(self) -> Config | None:
        """Go on to the next rollout; return its step's settings, which `rl.schedule` may change, or
        None at the end of the run and when asked to stop."""
        if self.stop.requested or self.step >= self.config.run.steps:
            return None
        self.step += 1
        timeline.begin_step(self.step)
        self._record = StepRecord(self.collector)
        return self.config.at(self.step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` as the run's phase, and measure the seconds spent in it."""
        self.recorder.view.phase(name)
        with self._record.phase(name):
            yield

    async def finish_step(
        self, rollout: Rollout, metrics: dict[str, float], updates: list[dict[str, float]]
    ) -> None:
        """Record the step; evaluate and checkpoint when due. metrics: of the trainer's passes over
        the whole rollout; updates: of each mini-batch."""
        # In a thread: 8,192 long responses take 0.3 s.
        means = await asyncio.to_thread(rollout_metrics, rollout, version=self.step - 1)
        line = self._line(means) | metrics | mean_of_updates(updates)
        line |= self._record.times(rollout)
        line["tokens_per_second"] = line.pop("response_tokens") / line["time/step"]
        line["groups/replayed"] = self.engines.taken.num_recalled
        line |= await self.recorder.checkpoints.completed(self.trainer)
        await self._prune_log()
        records = sample_records(rollout.groups, self.step, "train", self.config.run.log_samples)
        self.recorder.step(line, records)
        if self.step <= FIRST_STEPS:
            # In a thread: it searches the texts of all responses.
            faults = await asyncio.to_thread(advice, rollout, self.config.at(self.step))
            self.recorder.advise(self.step, faults)
        if self.heldout.is_due(self.step):
            await self.engines.prove()
            await self.heldout.run(self.step)
        is_last = self.step == self.config.run.steps
        if is_last or self.step % self.config.checkpoint.every == 0:
            await self._save()

    async def finish(self) -> None:
        """Save what was done since the last checkpoint, when the loop was asked to stop."""
        if self.step != self.state.step:
            await self._save()

    async def close(self) -> None:
        """End the sampling, and refuse weights to engines that wait for them."""
        await self.engines.close()

    async def _resume(self) -> None:
        """Load the newest checkpoint into the trainer, and its state into the session."""
        view = self.recorder.view
        view.phase("loading checkpoint")
        await self.recorder.load(self.trainer, reference=self.passes.uses_reference)
        self.step = self.state.step
        self._rewards_before = Counter(self.state.rewards)
        counts = ", ".join(f"{n:,} {name}" for name, n in self._rewards_before.items() if n)
        view.message(f"calls of rewards so far, one for each response and term: {counts or 'none'}")
        self.engines.sampler.prompts.load_state_dict(self.state.sampler)

    def _line(self, means: dict[str, float]) -> dict[str, float]:
        """Return the numbers of the step that the trainer's passes do not return. means: of
        `rollout_metrics`."""
        return {
            "step": self.step,
            "optimizer_step": self.state.optimizer_step,
            **means,
            **self.engines.metrics(),
            "trainer/restarts": self.trainer.num_restarts,
            **self._record.metrics(),
        }

    async def _prune_log(self) -> None:
        """Delete the samples of steps before the oldest checkpoint, which are never repeated."""
        kept, log = complete_checkpoints(self.recorder.folder.checkpoints), self.engines.sampler.log
        if log and kept:
            await log.prune(step_of(kept[0]))

    async def _save(self) -> None:
        await self.engines.prove()
        self.state.step, self.state.sampler = self.step, self.engines.taken.prompts_after
        self.state.rewards = dict(self._rewards_before + Counter(self._num_rewards()))
        await self.recorder.save(self.trainer)

    def _num_rewards(self) -> dict[str, int]:
        snapshot = self.collector.pool.snapshot()
        return {name: n for name, n in snapshot.items() if name not in LEVELS}
