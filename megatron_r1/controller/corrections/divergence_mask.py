"""`rl.engine_mask: divergence`: tokens whose probability has left a region around the engine's have
no policy gradient that leads further away (DPPO with its binary estimate of total variation: arXiv
2602.04879).

    A_t ← 0 if A_t > 0 and π_θ(o_t) - π_engine(o_t) > high
    A_t ← 0 if A_t < 0 and π_engine(o_t) - π_θ(o_t) > low

π_θ is the policy at each update, so that this is a trust region of the step's own updates, too. A
ratio is large where a rare token becomes a little less rare; a difference of probabilities bounds
what moves the distribution. The source's bounds are 0.15. In place of a clip it weighs tokens by
π_θ / π_engine, at most a large cap: leave `rl.clip_low` and `rl.clip_high` at R1-Zero's wide 10 and
set `rl.importance_cap` to 20.

The log-probabilities have to be known before the loss: one product of the head more. Denominators,
KL and entropy are as in `token_mask`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.config.algorithms import LossSettings
from megatron_r1.controller.corrections import inner_loss

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import Head, PackedBatch
    from megatron_r1.trainer.losses import LossTerms


def loss(batch: PackedBatch, head: Head, settings: LossSettings) -> LossTerms:
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
        logprobs, _ = replace(head, records_old=False).logprobs()
        rise = logprobs.exp() - batch.rollout_logprobs.exp()
        advantages, mask = batch.advantages, settings.engine_mask
        further = torch.where(advantages > 0, rise > mask.high, -rise > mask.low)
        masked = further & (advantages != 0) & batch.is_response
    corrected = replace(batch, advantages=torch.where(masked, 0.0, advantages))
    terms = inner_loss(corrected, replace(head, batch=corrected), settings)
    share = Mean(masked.sum(), batch.is_response.sum())
    return terms._replace(metrics={**terms.metrics, "engine_mask/tokens": share})
