"""The engines and the trainer as the RL loop uses them.

`PolicyEngines` sample each step's rollout and get its weights. What an engine computes from pushed
weights counts only when it has proved that it computes what the trainer does; it does so while it
samples the next rollout.

`TrainerPasses` are the trainer's passes over a rollout, each with the settings that the recipe
gives it, and the samples that they are over: one a response, or one a branch of an episode."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import cached_property

from megatron_r1.config import Config
from megatron_r1.config.optimizer import learning_rate
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections import MASKS, wrap_loss
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.controller.rollouts.rollout import Rollout
from megatron_r1.controller.rollouts.step_sampler import SampledStep, StepSampler
from megatron_r1.controller.run_recorder import RunState
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine import AcceptanceMeter
from megatron_r1.trainer.operations import ModelOperations
from megatron_r1.trainer.training_sample import Sample


class PolicyEngines:
    """Samples with the policy's weights and pushes them; `pusher` connects trainer and engines.

    Args:
        trainer: is asked to free its GPUs' memory before a push to colocated engines.
        pusher: sends the trainer's weights to the engines, and probes what these compute.
        sampler: draws the prompts of each step and collects its rollout."""

    def __init__(self, trainer: TrainerClient, pusher: WeightPusher, sampler: StepSampler):
        self.trainer, self.pusher, self.sampler = trainer, pusher, sampler
        self._rollout_config = sampler.config.rollout
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
        self.sampler.begin(step)
        await self.wait_for_probes()  # while they sample
        self._sampled_step = await self.sampler.wait_for_step(step)
        if self._rollout_config.speculative.method != "none":
            self._draft_metrics = await self._acceptance.read(self.sampler.collector.fleet.engines)
        return self._sampled_step.rollout

    async def push(self, policy_version: int) -> None:
        """Send the trainer's weights to every engine, as `policy_version`; what these compute
        counts once `wait_for_probes` has returned. Call it in a block of `updating_weights`."""
        if self._rollout_config.colocated:
            await self.trainer.call(ModelOperations.free_memory, parameters=False)
        self._push_metrics = await self.pusher.push(policy_version)
        self._needs_push = False
        self.sampler.start_ahead(policy_version)

    @contextlib.asynccontextmanager
    async def free_for_trainer(self) -> AsyncIterator[None]:
        """Let the trainer use its weights in the block, between two rollouts. Engines that have
        their memory sleep from then on, and get the weights again before the next rollout."""
        if self.pusher.offloads:
            self._needs_push = True
            await self.sampler.collector.fleet.sleep()
        yield

    async def wait_for_probes(self) -> None:
        """Wait until the engines have answered the probes of the last push.

        Raises:
            EngineError: an engine computes something else than the trainer.
        """
        self._probe_metrics = await self.pusher.probe_results()
        self.sampler.release_buffered()

    @property
    def sampled_step(self) -> SampledStep:
        """The newest step that is sampled, with the state of the sampler after it."""
        assert self._sampled_step is not None, "rollout() comes first"
        return self._sampled_step

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
        self.pusher.close()
        await self.sampler.close()


class TrainerPasses:
    """Runs the passes of `rl.algorithm` on the trainer; each takes the settings of its step, which
    `rl.schedule` may have changed from the run's, and returns metrics.

    The samples stay with the trainer, from `load` to the next `load`.

    Args:
        config: the run's settings.
        trainer: the ranks.
        state: counts the policy's updates.

    Attributes:
        run_config: the run's settings, the same in every step."""

    def __init__(self, config: Config, trainer: TrainerClient, state: RunState):
        self.run_config, self.trainer, self.state = config, trainer, state
        self.algorithm = algorithms.find(config.rl.algorithm)
        self.uses_reference = config.uses_reference

    async def load(self, minibatches: list[list[Sample]]) -> dict[str, float]:
        """Send the samples of a rollout to the trainer."""
        return await self.trainer.load(minibatches)

    async def compute_logprobs(self, config: Config) -> dict[str, float]:
        """Compute every token's log-probability under π_old and π_ref.

        The first mini-batch's under π_old come with its update, which starts from π_old, unless
        token advantages or a mask need them earlier or replayed routing is measured before."""
        rl = config.rl
        is_read = self.algorithm.token_advantages is not None or rl.engine_mask in MASKS
        return await self.trainer.call(
            ModelOperations.compute_logprobs,
            temperature=config.rollout.temperature,
            reference=rl.kl_beta > 0,
            first_minibatch=is_read or rl.routing_replay,
        )

    async def compute_values(self) -> None:
        """Compute the critic's value of every token, if the algorithm has a critic."""
        if self.algorithm.rules.critic:
            await self.trainer.call(ModelOperations.compute_values)

    async def compute_token_advantages(self, config: Config) -> None:
        """Replace the responses' advantages by one per token, if the algorithm defines that."""
        if (function := self.algorithm.token_advantages) is not None:
            await self.trainer.call(
                ModelOperations.compute_token_advantages,
                function=function,
                settings=config.rl.token_settings,
            )

    async def mask_advantages(self, config: Config) -> dict[str, float]:
        """Leave out the policy gradient of tokens about which engine and trainer disagree, if
        `rl.engine_mask` says so; the method divergence is a part of the loss."""
        if (function := MASKS.get(config.rl.engine_mask)) is None:
            return {}
        return await self.trainer.call(
            ModelOperations.mask_advantages,
            function=function,
            settings=config.rl.engine_mask_settings,
        )

    async def measure_logprob_diff(self) -> dict[str, float]:
        """Compare the engines' log-probabilities with those under π_old."""
        return await self.trainer.call(ModelOperations.measure_logprob_diff)

    async def update_policy(self, config: Config, index: int) -> dict[str, float]:
        """Take one optimizer step of the policy on mini-batch `index`."""
        self.state.optimizer_step += 1
        rate = learning_rate(config.optimizer, self.state.optimizer_step, self.num_policy_updates)
        settings = config.rl.loss_settings(config.rollout.max_response_tokens)
        loss, settings = wrap_loss(self.algorithm.loss, settings)
        temperature = config.rollout.temperature
        metrics = await self.trainer.update(index, loss, settings, rate, temperature)
        return {**metrics, "learning_rate": rate}

    async def update_critic(self, config: Config, index: int, step: int) -> dict[str, float]:
        """Take one optimizer step of the critic on mini-batch `index` of training step `step`. Its
        learning rate decays as the policy's does, over all steps of the run.

        Args:
            config: the settings of this step.
            index: number of the loaded mini-batch, from 0.
            step: the training step, from 1."""
        settings = config.optimizer.model_copy(
            update={"learning_rate": config.critic.learning_rate}
        )
        update = self.run_config.updates_before(step) + index + 1
        total = self.run_config.updates_before(self.run_config.run.steps + 1)
        rate = learning_rate(settings, update, total)
        return await self.trainer.update_critic(index, rate)

    @cached_property
    def num_policy_updates(self) -> int:
        """Updates of the policy in the whole run."""
        return self.run_config.num_policy_updates

    async def refresh_reference_if_due(self, config: Config) -> None:
        """Replace the reference by the policy every `rl.reference_refresh` optimizer steps."""
        rl, done = config.rl, self.state.optimizer_step
        every = rl.reference_refresh
        if not (self.uses_reference and every and done):  # 0: only a critic has been updated yet
            return
        if done // every > (done - rl.minibatches) // every:
            await self.trainer.call(ModelOperations.refresh_reference)
