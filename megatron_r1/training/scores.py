"""What a loss may ask of a score model, and the two losses that reward models learn by.

A sample is one text; its score is read at its last token, whatever that is. Its position may lie
with any rank of the context group, and all of them make the same loss of the same scores: the
gradient reaches the position where it is, and the sample is counted on the first context rank
(`PackedBatch.num_samples`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from megatron_r1.training.losses import LossTerms
from megatron_r1.training.packed import PackedBatch


@dataclass(frozen=True)
class Scores:
    """One micro-batch behind a score head.

    every: (T,) fp32, the score after each token this rank holds; context_group: the ranks that hold
    the others."""

    batch: PackedBatch
    every: Tensor
    context_group: ProcessGroup

    def of_samples(self) -> Tensor:
        """(S,) fp32, at the last token of each sample; the same on every context rank."""
        at = self.batch.last_tokens
        held = torch.where(at >= 0, self.every[at.clamp(min=0)], 0.0)
        # Over the context group: of each sample one rank has the score, the others 0. Summed
        # forward and passed through backward, whatever the group is of.
        return reduce_from_tensor_model_parallel_region(held, group=self.context_group)


def pairwise(batch: PackedBatch, scores: Scores, settings: dict[str, Any]) -> LossTerms:
    """Bradley-Terry: -log sigmoid(s_chosen - s_rejected), averaged over pairs (arXiv 2203.02155,
    equation 1, with one pair a question). Samples 2i and 2i + 1 are a pair, the chosen one first.

    accuracy: the share of pairs whose chosen response scores higher; margin: s_chosen - s_rejected.
    """
    of_samples = scores.of_samples()
    margins = of_samples[0::2] - of_samples[1::2]
    measured = {"accuracy": margins > 0, "margin": margins}
    return _terms(batch, -logsigmoid(margins), measured, batch.num_samples // 2)


def pointwise(batch: PackedBatch, scores: Scores, settings: dict[str, Any]) -> LossTerms:
    """Binary cross entropy of sigmoid(score) with the samples' labels, averaged over samples.

    accuracy: the share of scores on their label's side of 0; margin: how far they are there.
    """
    of_samples, labels = scores.of_samples(), batch.labels
    margins = of_samples * (2 * labels - 1)
    losses = binary_cross_entropy_with_logits(of_samples, labels, reduction="none")
    return _terms(batch, losses, {"accuracy": margins > 0, "margin": margins}, batch.num_samples)


def _terms(
    batch: PackedBatch, losses: Tensor, measured: dict[str, Tensor], count: int
) -> LossTerms:
    # Every context rank has all the losses; one of them reports.
    reports = batch.num_samples > 0
    sums = {
        f"{name}/count": values.detach().float().sum() * reports
        for name, values in {"loss": losses, **measured}.items()
    }
    denominator = torch.tensor(count, dtype=torch.int, device=losses.device)
    return LossTerms(losses.sum(), denominator, {**sums, "count": denominator}, {})
