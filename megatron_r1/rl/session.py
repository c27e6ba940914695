"""The run around the algorithm: its begin and end, the records of its steps, its checkpoints."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from megatron_r1.config import Config
from megatron_r1.fleet.speculation import AcceptanceMeter
from megatron_r1.processes import timeline
from megatron_r1.processes.stopping import StopRequest
from megatron_r1.rewards.runtime.meter import RewardMeter
from megatron_r1.rewards.runtime.pool import LEVELS
from megatron_r1.rl.advice import FIRST_STEPS, advice
from megatron_r1.rl.heldout import HeldoutEvaluation
from megatron_r1.rl.metrics import mean_of_updates, rollout_metrics, sample_records
from megatron_r1.rl.rollout import Rollout
from megatron_r1.rl.step_sampler import StepRollout, StepSampler
from megatron_r1.rl.trainer_passes import TrainerPasses
from megatron_r1.trainer_client.recorder import Recorder
from megatron_r1.training.checkpoints.finding import complete_checkpoints, step_of
from megatron_r1.training.operations import ModelOperations


class Session:
    """One RL run in progress. `step` counts rollouts, from 1; `state.optimizer_step` counts updates
    of the policy."""

    def __init__(
        self,
        recorder: Recorder,
        stop: StopRequest,
        sampler: StepSampler,
        passes: TrainerPasses,
        heldout: HeldoutEvaluation,
    ):
        self.config, self.state = passes.run_config, recorder.state
        self.recorder, self.stop = recorder, stop
        self.sampler, self.passes, self.heldout = sampler, passes, heldout
        self.collector, self.trainer = sampler.collector, passes.trainer
        self.step = self.state.step
        self._taken: StepRollout | None = None
        self._seconds: dict[str, float] = {}
        self._step_start = 0.0
        self._push_metrics: dict[str, float] = {}
        self._probe_metrics: dict[str, float] = {}
        """Of the push before, whose weights the step's rollout is sampled from."""
        self._acceptance = AcceptanceMeter()
        self._draft_metrics: dict[str, float] = {}
        self._rewards_before: Counter[str] = Counter()
        self._meter = RewardMeter(self.collector.pool)

    async def begin(self) -> None:
        """Put trainer and engines where the run was left, or at its beginning."""
        timeline.watch_waiting(asyncio.get_running_loop())
        view, uses_reference = self.recorder.view, self.passes.uses_reference
        fleet = self.collector.fleet
        if self.config.rollout.colocated:
            await fleet.sleep()  # a checkpoint, and then the weights in transit, need their memory
        if self.recorder.resumed:
            view.phase("loading checkpoint")
            await self.recorder.load(self.trainer, reference=uses_reference)
            self.step = self.state.step
            self._rewards_before = Counter(self.state.rewards)
            counts = ", ".join(f"{n:,} {name}" for name, n in self._rewards_before.items() if n)
            view.message(
                f"calls of rewards so far, one for each response and term: {counts or 'none'}"
            )
            self.sampler.prompts.load_state_dict(self.state.sampler)
        elif uses_reference:
            await self.trainer.call(ModelOperations.keep_reference)
        # The pool may be older than this session: its counts until now are not of this session.
        self._rewards_before.subtract(self._num_rewards())
        await self.passes.bridge.open()
        await self.push_weights()
        if self.step == 0:
            await self._prove_engines()
            await self.heldout.run(self.step)
        self.sampler.start(self.step + 1)

    def next_step(self) -> Config | None:
        """Go on to the next rollout; return its step's settings, which `rl.schedule` may change, or
        None at the end of the run and when asked to stop."""
        if self.stop.requested or self.step >= self.config.run.steps:
            return None
        self.step += 1
        timeline.begin_step(self.step)
        self._seconds = {}
        self._meter = RewardMeter(self.collector.pool)
        self._step_start = time.perf_counter()
        return self.config.at(self.step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` as the run's phase, and measure the seconds spent in it."""
        self.recorder.view.phase(name)
        start = time.perf_counter()
        with timeline.span(f"phase/{name}"):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    async def rollout(self) -> Rollout:
        self.sampler.begin(self.step)
        await self._prove_engines()  # while they sample
        self._taken = await self.sampler.take(self.step)
        if self.config.rollout.speculative.method != "none":
            self._draft_metrics = await self._acceptance.read(self.collector.fleet.engines)
        return self._taken.rollout

    async def push_weights(self) -> None:
        """Send the trainer's weights to every engine, as version `step`; what these compute counts
        once `_prove_engines` has returned."""
        bridge = self.passes.bridge
        await bridge.hold()  # an update has done so, but there is none while only a critic trains
        if self.config.rollout.colocated:
            await self.trainer.call(ModelOperations.yield_memory)
        self._push_metrics = await bridge.push(self.step)
        self.sampler.pushed(self.step)

    async def _prove_engines(self) -> None:
        """Wait until the engines have answered the probes of the last push. Raises EngineError
        where one computes something else than the trainer."""
        self._probe_metrics = await self.passes.bridge.proven()
        self.sampler.proven()

    async def finish_step(
        self, rollout: Rollout, metrics: dict[str, float], updates: list[dict[str, float]]
    ) -> None:
        """Record the step; evaluate and checkpoint when due. metrics: of the trainer's passes over
        the whole rollout; updates: of each mini-batch."""
        # In a thread: 8,192 long responses take 0.3 s.
        means = await asyncio.to_thread(rollout_metrics, rollout, version=self.step - 1)
        line = self._metrics(means) | metrics | mean_of_updates(updates) | self._times(rollout)
        line["tokens_per_second"] = line.pop("response_tokens") / line["time/step"]
        assert self._taken is not None, "rollout() comes first"
        line["groups/replayed"] = self._taken.num_recalled
        line |= await self.recorder.checkpoints.completed(self.trainer)
        await self._prune_log()
        records = sample_records(rollout.groups, self.step, "train", self.config.run.log_samples)
        self.recorder.step(line, records)
        if self.step <= FIRST_STEPS:
            # In a thread: it searches the texts of all responses.
            faults = await asyncio.to_thread(advice, rollout, self.config.at(self.step))
            self.recorder.advise(self.step, faults)
        if self.heldout.is_due(self.step):
            await self._prove_engines()
            await self.heldout.run(self.step)
        is_last = self.step == self.config.run.steps
        if is_last or self.step % self.config.checkpoint.every == 0:
            await self._save()

    async def finish(self) -> None:
        """Save what was done since the last checkpoint, when the loop was asked to stop."""
        if self.step != self.state.step:
            await self._save()

    async def close(self) -> None:
        """Release the engines that wait for weights, and cancel what is being sampled."""
        self.passes.bridge.close()
        await self.sampler.close()

    def _metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Return the numbers of the step that the trainer's passes do not return. means: of
        `rollout_metrics`."""
        metrics: dict[str, float] = {
            "step": self.step,
            "optimizer_step": self.state.optimizer_step,
            **means,
            **self.collector.fleet.metrics(),
            **self._push_metrics,
            **self._probe_metrics,
            **self._draft_metrics,
            "trainer/restarts": self.trainer.num_restarts,
            **self._meter.read(),
        }
        if (teacher := self.collector.teacher) is not None:
            metrics |= {f"teacher/{name}": value for name, value in teacher.metrics().items()}
        return metrics

    def _times(self, rollout: Rollout) -> dict[str, float]:
        times = {
            "time/rollout": rollout.rollout_seconds,
            "time/wait": self._seconds["rollout"],
            "time/reward": rollout.reward_seconds,
            "time/train": self._seconds["train"],
            "time/push": self._seconds["push"],
            "time/step": time.perf_counter() - self._step_start,
        }
        if self.collector.teacher is not None:
            times["time/teacher"] = rollout.teacher_seconds
        return times

    async def _prune_log(self) -> None:
        """Delete the samples of steps before the oldest checkpoint, which are never repeated."""
        kept = complete_checkpoints(self.recorder.folder.checkpoints)
        if self.sampler.log and kept:
            await self.sampler.log.prune(step_of(kept[0]))

    async def _save(self) -> None:
        assert self._taken is not None, "rollout() comes first"
        await self._prove_engines()
        self.state.step, self.state.sampler = self.step, self._taken.prompts_after
        self.state.rewards = dict(self._rewards_before + Counter(self._num_rewards()))
        await self.recorder.save(self.trainer)

    def _num_rewards(self) -> dict[str, int]:
        snapshot = self.collector.pool.snapshot()
        return {name: n for name, n in snapshot.items() if name not in LEVELS}
