"""The engines as the RL loop uses them.

They sample each step's rollout and get its weights. What an engine computes from pushed weights
counts only when it has proved that it computes what the trainer does; it does so while it samples
the next rollout."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.controller.rollouts.rollout import Rollout
from megatron_r1.controller.rollouts.step_sampler import SampledStep, StepSampler
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.draft_acceptance import AcceptanceMeter
from megatron_r1.trainer.operations import ModelOperations


class PolicyEngines:
    """Samples with the policy's weights and pushes them; `pusher` connects trainer and engines.

    Args:
        trainer: is asked to free its GPUs' memory before a push to colocated engines.
        pusher: sends the trainer's weights to the engines, and probes what these compute.
        step_sampler: draws the prompts of each step and collects its rollout."""

    def __init__(self, trainer: TrainerClient, pusher: WeightPusher, step_sampler: StepSampler):
        self.trainer, self.pusher, self.step_sampler = trainer, pusher, step_sampler
        self._rollout_config = step_sampler.config.rollout
        self._sampled_step: SampledStep | None = None
        self._needs_push = False
        self._acceptance = AcceptanceMeter()
        self._push_metrics: dict[str, float] = {}
        self._probe_metrics: dict[str, float] = {}
        """Of the push before, whose weights the step's rollout is sampled from."""
        self._draft_metrics: dict[str, float] = {}

    async def open(self, policy_version: int) -> None:
        """Connect trainer and engines, and push the weights that the trainer begins with."""
        async with self.updating_weights():
            await self.pusher.open()
            await self.push(policy_version)

    def updating_weights(self) -> AbstractAsyncContextManager[None]:
        """Keep engines from joining while the block changes the trainer's weights and pushes them:
        an engine that joined would get weights between two versions."""
        return self.pusher.updating_weights()

    async def rollout(self, step: int) -> Rollout:
        """Return the rollout of `step`, which may have begun before."""
        if self._needs_push:
            async with self.updating_weights():
                await self.push(step - 1)
        self.step_sampler.ensure_started(step)
        await self.wait_for_probes()  # while they sample
        self._sampled_step = await self.step_sampler.wait_for_step(step)
        if self._rollout_config.speculative.method != "none":
            engines = self.step_sampler.collector.fleet.engines
            self._draft_metrics = await self._acceptance.read(engines)
        return self._sampled_step.rollout

    async def push(self, policy_version: int) -> None:
        """Send the trainer's weights to every engine, as `policy_version`; what these compute
        counts once `wait_for_probes` has returned. Call it in a block of `updating_weights`."""
        if self._rollout_config.colocated:
            await self.trainer.call(ModelOperations.free_memory, free_parameters=False)
        self._push_metrics = await self.pusher.push(policy_version)
        self._needs_push = False
        self.step_sampler.prefetch(policy_version)

    @contextlib.asynccontextmanager
    async def free_for_trainer(self) -> AsyncIterator[None]:
        """Let the trainer use its weights in the block, between two rollouts. Engines that have
        their memory sleep from then on, and get the weights again before the next rollout."""
        if self.pusher.offloads:
            self._needs_push = True
            await self.step_sampler.collector.fleet.sleep()
        yield

    async def wait_for_probes(self) -> None:
        """Wait until the engines have answered the probes of the last push.

        Raises:
            EngineError: an engine computes something else than the trainer.
        """
        self._probe_metrics = await self.pusher.probe_results()
        self.step_sampler.flush_buffered()

    @property
    def sampled_step(self) -> SampledStep:
        """The newest step that is sampled, with the state of the prompt sampler after it."""
        assert self._sampled_step is not None, "rollout() comes first"
        return self._sampled_step

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the engines and of the push."""
        return {
            **self.step_sampler.collector.fleet.metrics(),
            **self._push_metrics,
            **self._probe_metrics,
            **self._draft_metrics,
        }

    async def close(self) -> None:
        """Release the engines that wait for weights, and cancel what is being sampled."""
        self.pusher.close()
        await self.step_sampler.close()
