"""The losses of reward models, which `reward_model.kind` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.losses import LossSum
from megatron_r1.trainer.metrics import Mean

if TYPE_CHECKING:
    from megatron_r1.trainer.output_heads import ScoreHeadOutput


def pairwise(batch: PackedMicrobatch, scores: ScoreHeadOutput, settings: object = None) -> LossSum:
    """Return Σ -log sigmoid(s_chosen - s_rejected) over pairs, () fp32, with their number.

    Bradley-Terry (arXiv 2203.02155, equation 1, with one pair per question). Samples 2i and 2i + 1
    are a pair, the chosen one first. Metrics: accuracy, the share of pairs whose chosen response
    scores higher; margin, s_chosen - s_rejected.

    Args:
        batch: the micro-batch, of whole pairs.
        scores: the score model's output.
        settings: None; it is here because every `Loss` is called with three arguments."""
    sample_scores = scores.last_token_scores()
    margins = sample_scores[0::2] - sample_scores[1::2]
    pair_values = {"accuracy": margins > 0, "margin": margins}
    return _reward_terms(batch, -logsigmoid(margins), pair_values, batch.num_responses // 2)


def pointwise(batch: PackedMicrobatch, scores: ScoreHeadOutput, settings: object = None) -> LossSum:
    """Return the sum over samples of the binary cross entropy of their scores and labels.

    Σ BCE(sigmoid(score), `batch.labels`), () fp32, with the number of samples. Metrics: accuracy,
    the share of scores on their label's side of 0; margin, the distance to 0 there.

    Args:
        batch: the micro-batch, with labels.
        scores: the score model's output.
        settings: None; it is here because every `Loss` is called with three arguments."""
    sample_scores, labels = scores.last_token_scores(), batch.labels
    margins = sample_scores * (2 * labels - 1)
    losses = binary_cross_entropy_with_logits(sample_scores, labels, reduction="none")
    return _reward_terms(
        batch, losses, {"accuracy": margins > 0, "margin": margins}, batch.num_responses
    )


def _reward_terms(
    batch: PackedMicrobatch, losses: Tensor, measured: dict[str, Tensor], count: int
) -> LossSum:
    # Every context rank has all the losses; the first one reports them.
    reports = batch.num_responses > 0
    denominator = torch.full((), count, dtype=torch.int, device=losses.device)
    means = {
        name: Mean(values.detach().float().sum() * reports, denominator)
        for name, values in {"loss": losses, **measured}.items()
    }
    return LossSum(losses.sum(), denominator, means)
