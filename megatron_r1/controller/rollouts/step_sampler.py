"""The rollouts of the training steps, sampled ahead of training and kept in the sample log.

Step s trains the policy of version s - 1. Its rollout may begin to be sampled once the engines hold
version s - 1 - staleness. With staleness 0 rollout and training take turns; with 1 the next rollout
is sampled while this one is trained on (one step off), and so on. No token is older than
`staleness` versions when it is trained on. Sampling continues across a weight push, and each token
is stamped with the version that made it."""

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

from r1_grading.terms import weights_at

from megatron_r1.config import Config
from megatron_r1.config.schedule import digest_until
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.dynamic_sampling import collect_dynamic_rollout
from megatron_r1.controller.rollouts.rollout import Rollout, RolloutSampling
from megatron_r1.controller.rollouts.rollout_stream import RolloutStream
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engines.server import gpu
from megatron_r1.models import read_hf_config
from megatron_r1.models.routing_shape import routing_shape


@dataclass(frozen=True)
class SampledStep:
    """A step whose rollout is sampled.

    Attributes:
        rollout: the groups, sampled and graded.
        sampler_state: state of the prompt sampler after the step's prompts.
        num_restored: groups that came from the sample log.
    """

    rollout: Rollout
    sampler_state: dict[str, Any]
    num_restored: int = 0


class StepSampler:
    """Draws each step's prompts and collects its rollout, up to `rl.staleness` steps ahead.

    Args:
        config: the run's settings; each step has its own by `Config.at`.
        collector: has the engines sample and the rewards grade.
        prompt_sampler: the order of the training prompts, and the position in it.
        sample_log: keeps finished groups for a restart; None: they are sampled again."""

    def __init__(
        self,
        config: Config,
        collector: RolloutCollector,
        prompt_sampler: PromptSampler,
        sample_log: SampleLog | None,
    ):
        self.config, self.collector = config, collector
        self.prompt_sampler, self.sample_log = prompt_sampler, sample_log
        replays = config.rl.routing_replay
        self._routing = routing_shape(read_hf_config(config.model.path)) if replays else None
        self._stream: RolloutStream[SampledStep] | None = None

    def open(self, first_step: int) -> None:
        """Get ready to sample the steps from `first_step`; the engines hold the version before."""
        # A full collection visits every module that is loaded, 54 ms in which the event loop stands
        # still; frozen objects are left out.
        gc.collect()
        gc.freeze()
        rl = self.config.rl
        # On a GPU the next batch fills the slots that the last long samples leave free. On a CPU it
        # slows them down: 2.5 s a step with overlap, 2.2 s without (docs/learned.md).
        one_at_a_time = rl.dynamic_sampling or gpu.engine_device() == "cpu"
        steps = first_step, self.config.run.steps
        self._stream = RolloutStream(
            self._sample_step, *steps, rl.staleness, one_at_a_time=one_at_a_time
        )

    def ensure_started(self, step: int) -> None:
        """Start the rollout of `step`, unless `prefetch` has started it."""
        assert self._stream is not None, "open() comes first"
        self._stream.start_allowed_by(step - 1)

    async def wait_for_step(self, step: int) -> SampledStep:
        """Wait for the rollout of `step`, after `ensure_started`; those of later steps continue as
        far as `rl.staleness` allows. Colocated engines then sleep until the next push."""
        assert self._stream is not None, "open() comes first"
        sampled_step = await self._stream.get(step)
        if self.config.rollout.colocated:
            await self.collector.fleet.sleep()
        return sampled_step

    def prefetch(self, policy_version: int) -> None:
        """Start the rollouts that may be sampled ahead from `policy_version`. Their samples are not
        written down until `flush_buffered`."""
        if self.sample_log:
            self.sample_log.start_buffering()
        if self._stream is not None and self.config.rl.staleness:
            self._stream.start_allowed_by(policy_version)

    def flush_buffered(self) -> None:
        """Write the samples buffered since `prefetch`, now that the probes have passed."""
        if self.sample_log:
            self.sample_log.write_buffered()

    async def close(self) -> None:
        """Cancel what is still sampled for later steps."""
        if self._stream is not None:
            await self._stream.close()

    async def _sample_step(self, step: int) -> SampledStep:
        """Draw the prompts of a step and collect its rollout under the step's settings."""
        config = self.config.at(step)
        rl, rollout_config = config.rl, config.rollout
        sampling = RolloutSampling(
            group_size=rl.group_size,
            temperature=rollout_config.temperature,
            top_p=rollout_config.top_p,
            top_k=rollout_config.top_k,
            min_p=rollout_config.min_p,
            sampling_mask=rollout_config.uses_sampling_mask,
            max_response_tokens=rollout_config.max_response_tokens,
            step=step,
            reward_weights=weights_at(config.rewards.weights, step),
            routing=self._routing,
            with_teacher=self.collector.teachers is not None,
            stop=tuple(rollout_config.stop),
        )
        num_groups = rl.prompts_per_rollout
        # Drawn before the first await: the next batch may draw while this one is being sampled.
        draw = partial(self.prompt_sampler.next_by_kind, weights=rl.kind_weights)
        prompts = [] if rl.dynamic_sampling else draw(num_groups)
        sampler_state = self.prompt_sampler.state_dict()
        step_log = None
        if self.sample_log:
            step_log = await self.sample_log.step(step, digest_until(self.config.rl.schedule, step))
        collect = partial(self.collector.collect, sampling=sampling, step_log=step_log)
        if rl.dynamic_sampling:
            max_rounds = rl.dynamic_sampling_rounds
            rollout = await collect_dynamic_rollout(collect, draw, num_groups, max_rounds)
            sampler_state = self.prompt_sampler.state_dict()
        else:
            rollout = await collect(prompts)
        self.collector.check_grades(rollout.groups + rollout.filtered_groups)
        if step_log is None:
            return SampledStep(rollout, sampler_state)
        await step_log.commit()
        return SampledStep(rollout, sampler_state, step_log.num_restored)
