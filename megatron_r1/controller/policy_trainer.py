"""The trainer as the RL loop uses it: runs each pass over a rollout with the recipe's settings.

A sample is a response, or a branch of an episode."""

from functools import cached_property

from megatron_r1.config import Config
from megatron_r1.config.optimizer import learning_rate
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections import MASK_FUNCTIONS, wrap_loss
from megatron_r1.controller.run_recorder import RunState
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.trainer.operations import ModelOperations
from megatron_r1.trainer.training_sample import Sample


class PolicyTrainer:
    """Runs the passes of `rl.algorithm` on the trainer, and returns their metrics.

    Each takes the settings of its step, which `rl.schedule` may have changed from the run's. The
    samples stay with the trainer, from `load` to the next `load`.

    Args:
        config: the run's settings.
        trainer: calls the passes on the ranks.
        state: counts the policy's updates.

    Attributes:
        run_config: the run's settings, the same in every step."""

    def __init__(self, config: Config, trainer: TrainerClient, state: RunState):
        self.run_config, self.trainer, self.state = config, trainer, state
        self.algorithm = algorithms.find_algorithm(config.rl.algorithm)
        self.uses_reference = config.uses_reference

    async def load(self, minibatches: list[list[Sample]]) -> dict[str, float]:
        """Send the samples of a rollout to the trainer."""
        return await self.trainer.load(minibatches)

    async def compute_logprobs(self, config: Config) -> dict[str, float]:
        """Compute every token's log-probability under π_old and π_ref.

        The first mini-batch's under π_old come with its update, which starts from π_old, unless
        token advantages or a mask need them earlier or replayed routing is measured before."""
        rl = config.rl
        needs_first_minibatch = (
            self.algorithm.token_advantages is not None
            or rl.engine_mask in MASK_FUNCTIONS
            or rl.routing_replay
        )
        return await self.trainer.call(
            ModelOperations.compute_logprobs,
            temperature=config.rollout.temperature,
            with_reference=rl.kl_beta > 0,
            with_first_minibatch=needs_first_minibatch,
        )

    async def compute_values(self) -> None:
        """Compute the critic's value of every token, if the algorithm has a critic."""
        if self.algorithm.rules.critic:
            await self.trainer.call(ModelOperations.compute_values)

    async def compute_token_advantages(self, config: Config) -> None:
        """Let the ranks replace the responses' advantages by one per token, with the function of
        the algorithm; without one nothing is called."""
        if (function := self.algorithm.token_advantages) is not None:
            await self.trainer.call(
                ModelOperations.compute_token_advantages,
                function=function,
                settings=config.rl.token_advantage_settings,
            )

    async def mask_advantages(self, config: Config) -> dict[str, float]:
        """Let the ranks leave out the policy gradient of tokens about which engine and trainer
        disagree, by the method of the step's `rl.engine_mask`, and return the metrics of it.

        Without a mask nothing is called; the method divergence is a part of the loss."""
        if (function := MASK_FUNCTIONS.get(config.rl.engine_mask)) is None:
            return {}
        return await self.trainer.call(
            ModelOperations.mask_advantages,
            function=function,
            settings=config.rl.engine_mask_settings,
        )

    async def measure_logprob_diff(self) -> dict[str, float]:
        """Let the ranks compare the engines' log-probabilities with those under π_old, and return
        the metrics of it."""
        return await self.trainer.call(ModelOperations.measure_logprob_diff)

    async def update_policy(self, config: Config, minibatch_index: int) -> dict[str, float]:
        """Take one optimizer step of the policy on a mini-batch."""
        self.state.optimizer_step += 1
        rate = learning_rate(config.optimizer, self.state.optimizer_step, self.num_policy_updates)
        settings = config.rl.loss_settings(config.rollout.max_response_tokens)
        loss, settings = wrap_loss(self.algorithm.loss, settings)
        temperature = config.rollout.temperature
        metrics = await self.trainer.update(minibatch_index, loss, settings, rate, temperature)
        return {**metrics, "learning_rate": rate}

    async def update_critic(
        self, config: Config, minibatch_index: int, step: int
    ) -> dict[str, float]:
        """Take one optimizer step of the critic on a mini-batch of training step `step`. Its
        learning rate decays as the policy's does, over all steps of the run.

        Args:
            config: the settings of this step.
            minibatch_index: number of the loaded mini-batch, from 0.
            step: the training step, from 1."""
        settings = config.optimizer.model_copy(
            update={"learning_rate": config.critic.learning_rate}
        )
        update = self.run_config.updates_before(step) + minibatch_index + 1
        num_updates = self.run_config.updates_before(self.run_config.run.steps + 1)
        rate = learning_rate(settings, update, num_updates)
        return await self.trainer.update_critic(minibatch_index, rate)

    @cached_property
    def num_policy_updates(self) -> int:
        """Updates of the policy in the whole run."""
        return self.run_config.num_policy_updates

    async def refresh_reference_if_due(self, config: Config) -> None:
        """Replace the reference by the policy every `rl.reference_refresh` optimizer steps."""
        interval, num_updates = config.rl.reference_refresh, self.state.optimizer_step
        # Without an update of the policy yet, only a critic has been updated.
        if not (self.uses_reference and interval and num_updates):
            return
        if num_updates // interval > (num_updates - config.rl.minibatches) // interval:
            await self.trainer.call(ModelOperations.refresh_reference)
