"""PPO's critic: a score model on the policy's ranks, with its loss and an optimizer of its own.

Its score after token t is V(s_t), the value of the text up to and including t, from which the
policy chooses token t + 1. It is read at the positions where the policy predicts a response token.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.megatron_config import transformer_config
from megatron_r1.models.routing_replay import replay_recomputations
from megatron_r1.trainer import construction
from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.losses import LossSum
from megatron_r1.trainer.metrics import Mean, merge_reports, reduce_over_data
from megatron_r1.trainer.passes import optimizer_step, run_passes

EQUAL_RETURNS = 1e-6
"""Returns count as equal up to this standard deviation, divided by their root mean square: the
rounding of R = A + V to fp32 is 6e-8."""


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
        self.model_chunks, self.ddp_chunks, self.optimizer = construction.build_network(
            critic_config, hf_config, critic_transformer_config, grid_position.groups, score_std=0.0
        )
        replay_recomputations(self.model_chunks)

    def compute_values(self, batches: list[PackedBatch]) -> None:
        """Fill `PackedBatch.values`, (T,) fp32 each, on the last stage."""
        run_passes(self.ddp_chunks, batches, _store_values, forward_only=True)

    def update(
        self, batches: list[PackedBatch], learning_rate: float, is_last: bool = True
    ) -> dict[str, float]:
        """Make one optimizer step towards `PackedBatch.returns`.

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


def _store_values(batch: PackedBatch, scores: Tensor) -> None:
    batch.values = torch.where(batch.is_response, scores.view(-1), 0.0)


def value_loss(batch: PackedBatch, scores: Tensor, clip: float | None) -> LossSum:
    """Return the clipped squared error of values, summed over response tokens.

    Σ ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²), with their number as the denominator.
    V_old is `batch.values`, R `batch.returns`, ε `clip`. The clipped term is that of PPO's first
    implementation (arXiv 2005.12729, section 3).

    Args:
        batch: the micro-batch, with `values` and `returns`.
        scores: (1, T) fp32, V at every position.
        clip: ε; None for ∞."""
    assert batch.values is not None and batch.returns is not None, "values and returns come first"
    rows, values = batch.response_positions, scores.view(-1)
    new_values, old_values, returns = values[rows], batch.values[rows], batch.returns[rows]
    # V_old + (V - V_old) differs from V by rounding and would be counted as clipped, so without a
    # limit V itself is taken.
    clipped_values = (
        new_values if clip is None else old_values + (new_values - old_values).clamp(-clip, clip)
    )
    losses, clipped_losses = (new_values - returns).square(), (clipped_values - returns).square()
    count = torch.full((), len(rows), dtype=torch.int, device=values.device)
    token_values = {
        "value/loss": 0.5 * torch.maximum(losses, clipped_losses),
        "value/clip_fraction": clipped_losses > losses,
        "value/mean": new_values,
        "return": returns,
        "return_squared": returns.double().square(),
        "error": returns - old_values,
        "error_squared": (returns - old_values).double().square(),
    }
    # fp64: the explained variance is a difference of mean squares and squared means.
    means = {name: Mean(x.detach().double().sum(), count) for name, x in token_values.items()}
    return LossSum(token_values["value/loss"].sum(), count, means)


def explained_variance(metrics: dict[str, float]) -> float:
    """Return 1 - Var(R - V) / Var(R), and 0 for equal returns.

    Args:
        metrics: the metrics of the value loss, reduced over all ranks; the moments among them are
            removed."""
    min_returns = EQUAL_RETURNS**2 * metrics["return_squared"]
    returns, errors = (
        metrics.pop(f"{name}_squared") - metrics.pop(name) ** 2 for name in ("return", "error")
    )
    return 1 - errors / returns if returns > min_returns else 0.0
