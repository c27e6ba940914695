"""`rl.engine_mask`: tokens or responses about which engine and trainer disagree have no policy
gradient. Masked ones stay in the denominators: with much masked, a step is small, and not as large
as if little had been. Their KL and entropy terms stay: these do not use the engine's probabilities.

`token` (IcePop: Ring-1T, arXiv 2510.18855; INTELLECT-3, arXiv 2512.16144, eq. 1).

    A_t ← A_t if low ≤ k_t ≤ high, else 0,  k_t = π_old(o_t) / π_engine(o_t)

π_old is the trainer's policy before the step's updates, so that k compares two computations of the
same weights, or with `rl.staleness` also of older ones. The sources' bounds are 0.5 and 5. They
also weigh the tokens that are kept by k: set `rl.importance_cap` to `high`.

`sequence` (Liu, Li et al., "When Speed Kills Stability", 2025, richardli.xyz/rl-collapse, part 3:
rejection by the geometric mean).

    A_i,t ← A_i,t if low ≤ (Π_t k_i,t)^(1/|o_i|) ≤ high, else 0

The geometric mean, e to the mean of log k, does not depend on a response's length, as their product
would. It is near 1 where k is, hence the narrow bounds, 0.999 and 1.001, those of verl. With
`rl.staleness` k has the movement of the policy, which they hardly allow. `rl.importance_cap` weighs
the tokens of what is kept. The mean of an episode's branch is over its own sampled tokens.

`divergence`: tokens whose probability has left a region around the engine's have no policy gradient
that leads further away (DPPO with its binary estimate of total variation: arXiv 2602.04879).

    A_t ← 0 if A_t > 0 and π_θ(o_t) - π_engine(o_t) > high
    A_t ← 0 if A_t < 0 and π_engine(o_t) - π_θ(o_t) > low

π_θ is the policy at each update, so that this is a trust region of the step's own updates, too. A
ratio is large where a rare token becomes a little less rare; a difference of probabilities bounds
what moves the distribution. The source's bounds are 0.15. In place of a clip it weighs tokens by
π_θ / π_engine, at most a large cap: leave `rl.clip_low` and `rl.clip_high` at R1-Zero's wide 10 and
set `rl.importance_cap` to 20. The log-probabilities have to be known before the loss: one product
of the head more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.corrections import call_inner_loss

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_r1.config.engine_mask import EngineMaskSettings
    from megatron_r1.trainer.batch import PackedMicrobatch
    from megatron_r1.trainer.loss_head import LossHead
    from megatron_r1.trainer.losses import LossSum
    from megatron_r1.trainer.rollout_batches import RolloutBatches


def token_mask(rollout: RolloutBatches, settings: EngineMaskSettings) -> list[Tensor]:
    """Return (T,) bool per micro-batch: whether a token keeps its advantage.

    Args:
        rollout: the rollout, with the log-probabilities of π_old.
        settings: the bounds of k."""
    masks = []
    for microbatch in rollout.whole_microbatches:
        ratios = microbatch.rollout_log_ratios.exp()
        masks.append((ratios >= settings.low) & (ratios <= settings.high))
    return masks


def sequence_mask(rollout: RolloutBatches, settings: EngineMaskSettings) -> list[Tensor]:
    """Return (T,) bool per micro-batch: whether the response of a token keeps its advantage.

    Args:
        rollout: the rollout, with the log-probabilities of π_old.
        settings: the bounds of the geometric mean."""
    masks = []
    for microbatch in rollout.whole_microbatches:
        means = microbatch.sample_means(microbatch.rollout_log_ratios).exp()
        masks.append((means >= settings.low) & (means <= settings.high))
    return masks


def divergence_loss(batch: PackedMicrobatch, head: LossHead, settings: LossSettings) -> LossSum:
    """Return the algorithm's loss of the batch with masked advantages.

    Args:
        batch: the packed samples.
        head: the model's output layer.
        settings: those of the algorithm, with the mask's bounds in engine_mask."""
    import torch

    from megatron_r1.trainer.metrics import Mean

    settings = LossSettings.of(settings)
    with torch.no_grad():
        # Not as "old": what the update computes itself is the ratio's other side.
        logprobs, _ = replace(head, stores_old_logprobs=False).logprobs()
        probability_rise = logprobs.exp() - batch.rollout_logprobs.exp()
        advantages, mask = batch.advantages, settings.engine_mask
        is_outside = torch.where(
            advantages > 0, probability_rise > mask.high, -probability_rise > mask.low
        )
        is_masked = is_outside & (advantages != 0) & batch.is_response
    corrected_batch = replace(batch, advantages=torch.where(is_masked, 0.0, advantages))
    loss_sum = call_inner_loss(corrected_batch, replace(head, batch=corrected_batch), settings)
    masked_fraction = Mean(is_masked.sum(), batch.is_response.sum())
    return loss_sum._replace(metrics={**loss_sum.metrics, "engine_mask/tokens": masked_fraction})
