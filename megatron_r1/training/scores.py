"""The scores of a micro-batch as a loss sees them, and the two losses of reward models.

A sample is one text; its score is read at its last token. That position may be on any rank of the
context group. All these ranks compute the same loss from the same scores; the gradient reaches the
rank that has the position, and the sample is counted on the first context rank
(`PackedBatch.num_trajectories`)."""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from megatron_r1.training.batch import PackedBatch
from megatron_r1.training.losses import LossTerms
from megatron_r1.training.metrics import Mean


@dataclass(frozen=True)
class Scores:
    """The output of a score head for one micro-batch.

    every: (T,) fp32, the score after each token of this rank; context_group: the ranks that hold
    the other tokens."""

    batch: PackedBatch
    every: Tensor
    context_group: ProcessGroup

    def of_samples(self) -> Tensor:
        """Return the scores (S,) fp32 at the last token of each sample, on every context rank."""
        at = self.batch.last_tokens
        held = torch.where(at >= 0, self.every[at.clamp(min=0)], 0.0)
        # Over the context group: of each sample one rank has the score, the others 0. Megatron's
        # "tensor" region sums over any group in the forward pass and is the identity backward.
        return reduce_from_tensor_model_parallel_region(held, group=self.context_group)


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
