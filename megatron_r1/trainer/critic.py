"""PPO's critic: a score model on the policy's ranks, with an optimizer of its own.

Its score after token t is V(s_t), the value of the text up to and including t, from which the
policy chooses token t + 1. It is read at the positions where the policy predicts a response token.
Its loss is in `value_loss`."""

from functools import partial

import torch
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.models.attention_choice import check_attention, longest_sample
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.megatron_config import transformer_config
from megatron_r1.models.routing_replay import replay_recomputations
from megatron_r1.trainer import construction
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.metrics import merge_reports, reduce_over_data
from megatron_r1.trainer.passes import optimizer_step, run_passes
from megatron_r1.trainer.value_loss import explained_variance, value_loss


def needs_critic(config: Config) -> bool:
    """Whether the recipe trains a policy with an algorithm that has a critic."""
    return config.model.head == "language" and find_rules(config.rl.algorithm).critic


class Critic:
    """The part of the value model that a rank has, and its optimizer."""

    def __init__(self, config: Config, grid_position: GridPosition):
        """Build the model. A new head starts at zero: every value is then 0, and the first
        advantages are those without a critic.

        Raises:
            UserError: the model's vocabulary is smaller than the policy's, or `construction`
                cannot build the model with these settings.
        """
        critic_config = config.critic_run_config()
        hf_config = read_hf_config(critic_config.model.path, "score", "critic.path")
        policy_tokens = read_hf_config(config.model.path)["vocab_size"]
        if hf_config["vocab_size"] < policy_tokens:
            raise UserError(
                f"critic.path: {critic_config.model.path} knows {hf_config['vocab_size']} tokens, "
                f"the policy {policy_tokens}; give a model with the policy's tokenizer",
                key="critic.path",
                cause=Cause.CONFLICT,
            )
        self.grid_position = grid_position
        self.value_clip = config.critic.value_clip
        critic_transformer_config = transformer_config(hf_config, critic_config)
        if critic_transformer_config.transformer_impl == "transformer_engine":
            longest = longest_sample(config, hf_config)
            check_attention(critic_config, critic_transformer_config, longest)
        self.model_chunks, self.ddp_chunks, self.optimizer = construction.build_network(
            critic_config, hf_config, critic_transformer_config, grid_position.groups, score_std=0.0
        )
        replay_recomputations(self.model_chunks)

    def compute_values(self, batches: list[PackedMicrobatch]) -> None:
        """Fill `PackedMicrobatch.values`, (T,) fp32 each, on the last stage."""
        run_passes(self.ddp_chunks, batches, _store_values, forward_only=True)

    def update(
        self, batches: list[PackedMicrobatch], learning_rate: float, is_last: bool = True
    ) -> dict[str, float]:
        """Make one optimizer step towards `PackedMicrobatch.returns`.

        Args:
            batches: the micro-batches of the mini-batch.
            learning_rate: the learning rate of this update.
            is_last: whether this is the rollout's last update, as in `optimizer_step`.

        Returns:
            Over the response tokens of the whole mini-batch, value/loss, value/clip_fraction,
            value/mean (before the update), value/explained_variance of the values used for the
            advantages (1: equal to the returns; 0: no better than their mean), and value/grad_norm.
        """
        compute = partial(value_loss, clip=self.value_clip)
        run = partial(run_passes, self.ddp_chunks, batches, compute, forward_only=False)
        reports, step_metrics = optimizer_step(
            self.ddp_chunks, self.optimizer, learning_rate, run, is_last=is_last
        )
        metrics = reduce_over_data(self.grid_position, merge_reports(reports))
        if metrics:
            metrics["value/explained_variance"] = explained_variance(metrics)
        return metrics | {f"value/{name}": value for name, value in step_metrics.items()}


def _store_values(batch: PackedMicrobatch, scores: Tensor) -> None:
    batch.values = torch.where(batch.is_response, scores.view(-1), 0.0)
