"""Everything around the algorithm: the three roles, the run folder, resuming, evaluating,
measuring.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from megatron_r1.config import Config
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engine import gpu
from megatron_r1.fleet.fleet import RolloutFleet
from megatron_r1.models import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.processes.stopping import StopRequest
from megatron_r1.rewards.runtime.meter import LEVELS, RewardMeter
from megatron_r1.rl import algorithms
from megatron_r1.rl.algorithms import Algorithm
from megatron_r1.rl.dynamic_sampling import collect_informative
from megatron_r1.rl.heldout import evaluate
from megatron_r1.rl.metrics import rollout_metrics, sample_records
from megatron_r1.rl.sample_log import SampleLog
from megatron_r1.rl.sampling import Collected, Rollouts, Sampling
from megatron_r1.rl.stream import RolloutStream
from megatron_r1.training.checkpoints.finding import step_of, whole
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder
from megatron_r1.training.schedule import learning_rate
from megatron_r1.weight_sync.bridge import WeightBridge


@dataclass(frozen=True)
class Batch:
    """One step's rollout; sampler: where the prompts after it begin. num_replayed: groups that came
    from the sample log."""

    rollout: Collected
    sampler: dict
    num_replayed: int = 0


class Session:
    """One RL run in progress. `step` counts rollouts, from 1; `state.optimizer_step` updates."""

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        trainer: TrainerClient,
        fleet: RolloutFleet,
        rollouts: Rollouts,
        prompts: PromptSampler,
        heldout: list,
        bridge: WeightBridge,
        stop: StopRequest,
        log: SampleLog | None = None,
    ):
        self.config, self.recorder = config, recorder
        self.trainer, self.fleet, self.rollouts = trainer, fleet, rollouts
        self.prompts, self.heldout, self.bridge = prompts, heldout, bridge
        self.state = recorder.state
        self.step = self.state.step
        self.stop, self.log = stop, log
        replays = config.rl.routing_replay
        self._routing = routing_shape(read_hf_config(config.model.path)) if replays else None
        self._rewards_before: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._began = 0.0
        self._stream: RolloutStream[Batch] | None = None
        self._batch: Batch | None = None
        self._push_metrics: dict[str, float] = {}

    async def begin(self) -> None:
        """Put the run where it was left, or at its beginning, on trainer and engines alike."""
        if self.recorder.resumed:
            self.recorder.view.phase("loading checkpoint")
            await self.recorder.load(self.trainer, reference=self.uses_reference)
            self.step = self.state.step
            self._rewards_before = Counter(self.state.rewards)
            counts = ", ".join(f"{n:,} {name}" for name, n in self._rewards_before.items())
            self.recorder.view.message(f"answers so far: {counts or 'none graded'}")
            self.prompts.load_state_dict(self.state.sampler)
        elif self.uses_reference:
            await self.trainer.call("keep_reference")
        # The pool may be older than this session: what it counted before is not of this one.
        self._rewards_before.subtract(self._rewards_done())
        await self.bridge.open()
        await self.push_weights()
        if self.step == 0:
            await self.evaluate()
        rl, steps = self.config.rl, self.config.run.steps
        # A GPU makes the last long samples of a batch no slower when the next one fills it up; to a
        # CPU every sequence is work, and the trainer waits for those.
        alone = rl.dynamic_sampling or gpu.device() == "cpu"
        self._stream = RolloutStream(
            self._sample, self.step + 1, steps, rl.staleness, one_at_a_time=alone
        )

    async def rollout(self) -> Collected:
        """This step's rollout; those of the steps after it go on being sampled, as far as
        `rl.staleness` lets them."""
        assert self._stream is not None, "begin() comes first"
        self._stream.pushed(self.step - 1)
        batch = await self._stream.take(self.step)
        if self.config.rollout.colocated:
            await self.fleet.sleep()  # until the next push
        self._batch = batch
        return batch.rollout

    async def _sample(self, step: int) -> Batch:
        rl, rollout = self.config.rl, self.config.rollout
        sampling = self._sampling(rl.group_size, rollout.temperature, rollout.top_p, step)
        is_scored = self.rollouts.teacher is not None
        sampling = replace(sampling, routing=self._routing, is_scored=is_scored)
        wanted = rl.questions_per_rollout
        # Drawn before anything is awaited: the next batch may draw before this one is back.
        prompts = [] if rl.dynamic_sampling else self.prompts.next(wanted)
        after = self.prompts.state_dict()
        memory = await self.log.step(step) if self.log else None
        collect = partial(self.rollouts.collect, sampling=sampling, memory=memory)
        if rl.dynamic_sampling:
            draw, rounds = self.prompts.next, rl.dynamic_sampling_rounds
            collected = await collect_informative(collect, draw, wanted, rounds)
            after = self.prompts.state_dict()
        else:
            collected = await collect(prompts)
        self.rollouts.check_grades(collected.groups + collected.passed_over)
        if memory is None:
            return Batch(collected, after)
        await memory.accept()
        return Batch(collected, after, memory.num_recalled)

    @property
    def eval_sampling(self) -> Sampling:
        settings = self.config.eval
        # The base model is evaluated as step 0, with the weights of the first step.
        step = max(1, self.step)
        return self._sampling(settings.samples, settings.temperature, settings.top_p, step)

    def _sampling(self, num_samples: int, temperature: float, top_p: float, step: int) -> Sampling:
        limit = self.config.rollout.max_response_tokens
        return Sampling(num_samples, temperature, top_p, limit, step)

    @property
    def uses_reference(self) -> bool:
        return self.config.rl.kl_beta > 0

    def next_step(self) -> bool:
        """Go on to the next rollout; False at the end, or when asked to stop."""
        if self.stop.requested or self.step >= self.config.run.steps:
            return False
        self.step += 1
        self._seconds = {}
        self._meter = RewardMeter(self.rollouts.pool)
        self._began = time.perf_counter()
        return True

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` and add up the seconds spent in it."""
        self.recorder.view.phase(name)
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    async def score(self, algorithm: Algorithm) -> dict[str, float]:
        """Log-probabilities under π_old and π_ref, and the critic's values, which stay with the
        trainer. Those of the first mini-batch under π_old come with its update, unless advantages
        are made of them or replayed routing is measured before."""
        if algorithm.rules.critic:
            await self.trainer.call("values")
        makes_advantages = algorithm.token_advantages is not None
        return await self.trainer.call(
            "score",
            temperature=self.config.rollout.temperature,
            reference=self.uses_reference,
            first_old=makes_advantages or self.config.rl.routing_replay,
        )

    async def token_advantages(self, algorithm: Algorithm) -> dict[str, float]:
        """Each token its own advantage, where the algorithm says so."""
        function = algorithm.token_advantages
        if function is None:
            return {}
        settings = self.config.rl.token_settings
        return await self.trainer.call("token_advantages", function=function, settings=settings)

    async def engine_agreement(self) -> dict[str, float]:
        """How far the engines' log-probabilities were from those under π_old."""
        return await self.trainer.call("agreement")

    async def update(self, index: int, loss: str) -> dict[str, float]:
        """One optimizer step on mini-batch `index`."""
        rl = self.config.rl
        await self.bridge.hold()
        self.state.optimizer_step += 1
        rate = learning_rate(self.config.optimizer, self.state.optimizer_step, self._num_updates)
        settings = {
            "temperature": self.config.rollout.temperature,
            "max_response_tokens": self.config.rollout.max_response_tokens,
            **rl.loss_settings,
        }
        metrics = await self.trainer.update(index, loss, settings, rate)
        return {**metrics, "learning_rate": rate}

    @property
    def _num_updates(self) -> int:
        """Of the policy, in the whole run: none while its critic warms up."""
        has_critic = algorithms.find(self.config.rl.algorithm).rules.critic
        waits = self.config.critic.warmup_steps if has_critic else 0
        return max(1, self.config.run.steps - waits) * self.config.rl.minibatches

    @property
    def is_warming_up(self) -> bool:
        """Whether only the critic learns as yet, if there is one."""
        return self.step <= self.config.critic.warmup_steps

    async def update_critic(self, index: int) -> dict[str, float]:
        """One optimizer step of the critic on mini-batch `index`; its rate decays as the policy's,
        over all steps of the run, those of the warm-up too."""
        rl, settings = self.config.rl, self.config.optimizer
        settings = settings.model_copy(update={"learning_rate": self.config.critic.learning_rate})
        done, total = ((n * rl.minibatches) for n in (self.step - 1, self.config.run.steps))
        rate = learning_rate(settings, done + index + 1, total)
        return await self.trainer.update_critic(index, rate)

    async def refresh_reference_if_due(self) -> None:
        """Replace the reference by the policy every `rl.reference_refresh` optimizer steps."""
        rl, done = self.config.rl, self.state.optimizer_step
        every = rl.reference_refresh
        if self.uses_reference and every and done // every > (done - rl.minibatches) // every:
            await self.trainer.call("keep_reference")

    async def push_weights(self) -> None:
        """The trainer's present weights become version `step` on every engine."""
        await self.bridge.hold()  # no update did, where the policy waits for its critic
        self._push_metrics = await self.bridge.push(self.step)
        if self._stream is not None and self.config.rl.staleness:
            self._stream.pushed(self.step)

    async def finish_step(
        self, rollout: Collected, measured: dict[str, float], updates: list[dict[str, float]]
    ) -> None:
        """Record the step, evaluate and checkpoint when due. measured: packing and agreement."""
        seconds = {
            "time/rollout": rollout.rollout_seconds,
            "time/wait": self._seconds["rollout"],
            "time/reward": rollout.reward_seconds,
            "time/train": self._seconds["train"],
            "time/push": self._seconds["push"],
            "time/step": time.perf_counter() - self._began,
        }
        metrics = {"step": self.step, "optimizer_step": self.state.optimizer_step}
        metrics |= rollout_metrics(rollout, self.step - 1)
        metrics |= self.fleet.metrics() | self._push_metrics
        if (teacher := self.rollouts.teacher) is not None:
            seconds["time/teacher"] = rollout.teacher_seconds
            metrics |= {f"teacher/{name}": value for name, value in teacher.metrics().items()}
        metrics["trainer/restarts"] = self.trainer.num_restarts
        metrics |= self._meter.read() | measured | mean_of_updates(updates) | seconds
        metrics["tokens_per_second"] = metrics.pop("response_tokens") / seconds["time/step"]
        metrics["groups/replayed"] = self._batch.num_replayed if self._batch else 0
        metrics |= await self.recorder.checkpoints.news(self.trainer)
        await self._prune_log()
        records = sample_records(rollout.groups, self.step, "train", self.config.run.log_samples)
        self.recorder.step(metrics, records)
        every = self.config.eval.every
        last = self.step == self.config.run.steps
        if last or (every and self.step % every == 0):
            await self.evaluate()
        if last or self.step % self.config.checkpoint.every == 0:
            await self._save()

    async def _prune_log(self) -> None:
        """Steps that even the oldest checkpoint is past will not be done again."""
        kept = whole(self.recorder.folder.checkpoints)
        if self.log and kept:
            await self.log.prune(step_of(kept[0]))

    async def finish(self) -> None:
        """Keep what was done since the last checkpoint, when the loop was asked to stop."""
        if self.step != self.state.step:
            await self._save()

    async def close(self) -> None:
        """Give up what is still being sampled."""
        self.bridge.close()
        if self._stream is not None:
            await self._stream.close()

    async def evaluate(self) -> None:
        """Held-out accuracy of the present policy; with step 0, the base model's."""
        if not self.heldout:
            return
        self.recorder.view.phase("evaluation", f"{len(self.heldout)} held-out questions")
        metrics, groups = await evaluate(self.rollouts, self.heldout, self.eval_sampling)
        records = sample_records(groups, self.step, "eval", None)
        self.recorder.evaluation({"step": self.step, **metrics}, records)

    async def _save(self) -> None:
        assert self._batch is not None, "rollout() comes first"
        self.state.step, self.state.sampler = self.step, self._batch.sampler
        self.state.rewards = dict(self._rewards_before + Counter(self._rewards_done()))
        await self.recorder.save(self.trainer)

    def _rewards_done(self) -> dict[str, int]:
        return {k: n for k, n in self.rollouts.pool.snapshot().items() if k not in LEVELS}


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Over the mini-batches of a rollout: means, but the maximum of what is a maximum."""
    names = updates[0].keys()
    return {
        name: (max if name.endswith("/max") else fmean)([u[name] for u in updates])
        for name in names
    }
