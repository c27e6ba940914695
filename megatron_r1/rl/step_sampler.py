"""The rollouts of the training steps, sampled ahead of training and kept in the sample log."""

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_r1.config import Config
from megatron_r1.config.schedule import digest_until
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engine import gpu
from megatron_r1.models import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.rewards.combine import weights_at
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.rl.dynamic_sampling import collect_informative
from megatron_r1.rl.rollout import Rollout, Sampling
from megatron_r1.rl.sample_log import SampleLog
from megatron_r1.rl.stream import RolloutStream


@dataclass(frozen=True)
class StepRollout:
    """One step's rollout. prompts_after: state of the prompt sampler after the step's prompts.
    num_recalled: groups that came from the sample log."""

    rollout: Rollout
    prompts_after: dict[str, Any]
    num_recalled: int = 0


class StepSampler:
    """Draws each step's prompts and collects its rollout, up to `rl.staleness` steps ahead."""

    def __init__(
        self,
        config: Config,
        collector: RolloutCollector,
        prompts: PromptSampler,
        log: SampleLog | None,
    ):
        self.config, self.collector, self.prompts, self.log = config, collector, prompts, log
        replays = config.rl.routing_replay
        self._routing = routing_shape(read_hf_config(config.model.path)) if replays else None
        self._stream: RolloutStream[StepRollout] | None = None

    def start(self, first_step: int) -> None:
        """Get ready to sample the steps from `first_step`; the engines hold the version before."""
        # A full collection visits every module that is loaded, 54 ms in which the event loop stands
        # still; frozen objects are left out.
        gc.collect()
        gc.freeze()
        rl = self.config.rl
        # On a GPU the next batch fills the slots that the last long samples leave free. On a CPU it
        # slows them down: 2.5 s a step with overlap, 2.2 s without (docs/learned.md).
        one_at_a_time = rl.dynamic_sampling or gpu.device() == "cpu"
        steps = first_step, self.config.run.steps
        self._stream = RolloutStream(
            self._sample, *steps, rl.staleness, one_at_a_time=one_at_a_time
        )

    def begin(self, step: int) -> None:
        """Start the rollout of `step`, unless it was started ahead."""
        assert self._stream is not None, "start() comes first"
        self._stream.pushed(step - 1)

    async def take(self, step: int) -> StepRollout:
        """Return the rollout of `step`, after `begin`; those of later steps continue as far as
        `rl.staleness` allows. Colocated engines then sleep until the next push."""
        assert self._stream is not None, "start() comes first"
        taken = await self._stream.take(step)
        if self.config.rollout.colocated:
            await self.collector.fleet.sleep()
        return taken

    def pushed(self, version: int) -> None:
        """Start the rollouts that may be sampled ahead from policy `version`. Their samples are
        not written down until `proven`."""
        if self.log:
            self.log.hold_back()
        if self._stream is not None and self.config.rl.staleness:
            self._stream.pushed(version)

    def proven(self) -> None:
        """Write down what was sampled since `pushed`: the engines compute what the trainer does."""
        if self.log:
            self.log.write_held()

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()

    async def _sample(self, step: int) -> StepRollout:
        """Draw the prompts of a step and collect its rollout under the step's settings."""
        config = self.config.at(step)
        rl, rollout = config.rl, config.rollout
        sampling = Sampling(
            num_samples=rl.group_size,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            step=step,
            weights=weights_at(config.rewards.weights, step),
            routing=self._routing,
            with_teacher=self.collector.teacher is not None,
            stop=tuple(rollout.stop),
        )
        num_groups = rl.questions_per_rollout
        # Drawn before the first await: the next batch may draw while this one is being sampled.
        draw = partial(self.prompts.next_by_kind, weights=rl.kind_weights)
        prompts = [] if rl.dynamic_sampling else draw(num_groups)
        prompts_after = self.prompts.state_dict()
        log = None
        if self.log:
            log = await self.log.step(step, digest_until(self.config.rl.schedule, step))
        collect = partial(self.collector.collect, sampling=sampling, log=log)
        if rl.dynamic_sampling:
            max_rounds = rl.dynamic_sampling_rounds
            collected = await collect_informative(collect, draw, num_groups, max_rounds)
            prompts_after = self.prompts.state_dict()
        else:
            collected = await collect(prompts)
        self.collector.check_grades(collected.groups + collected.passed_over)
        if log is None:
            return StepRollout(collected, prompts_after)
        await log.accept()
        return StepRollout(collected, prompts_after, log.num_recalled)
