"""The two losses of reward models, on the scores of whole texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.losses import LossTerms
from megatron_r1.trainer.metrics import Mean

if TYPE_CHECKING:
    from megatron_r1.trainer.scores import Scores


def pairwise(batch: PackedBatch, scores: Scores, settings: object = None) -> LossTerms:
    """Return Σ -log sigmoid(s_chosen - s_rejected) over pairs, () fp32, with their number.

    Bradley-Terry (arXiv 2203.02155, equation 1, with one pair per question). Samples 2i and 2i + 1
    are a pair, the chosen one first. Metrics: accuracy, the share of pairs whose chosen response
    scores higher; margin, s_chosen - s_rejected."""
    of_samples = scores.of_samples()
    margins = of_samples[0::2] - of_samples[1::2]
    measured = {"accuracy": margins > 0, "margin": margins}
    return _terms(batch, -logsigmoid(margins), measured, batch.num_trajectories // 2)


def pointwise(batch: PackedBatch, scores: Scores, settings: object = None) -> LossTerms:
    """Return Σ of the binary cross entropy of sigmoid(score) and `batch.labels` over samples, ()
    fp32, with their number.

    Metrics: accuracy, the share of scores on their label's side of 0; margin, the distance to 0
    there."""
    of_samples, labels = scores.of_samples(), batch.labels
    margins = of_samples * (2 * labels - 1)
    losses = binary_cross_entropy_with_logits(of_samples, labels, reduction="none")
    return _terms(
        batch, losses, {"accuracy": margins > 0, "margin": margins}, batch.num_trajectories
    )


def _terms(
    batch: PackedBatch, losses: Tensor, measured: dict[str, Tensor], count: int
) -> LossTerms:
    # Every context rank has all the losses; the first one reports them.
    reports = batch.num_trajectories > 0
    denominator = torch.tensor(count, dtype=torch.int, device=losses.device)
    means = {
        name: Mean(values.detach().float().sum() * reports, denominator)
        for name, values in {"loss": losses, **measured}.items()
    }
    return LossTerms(losses.sum(), denominator, means)
