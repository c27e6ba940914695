"""The scores of a micro-batch as a loss of reward models (`reward_losses`) sees them.

A sample is one text; its score is read at its last token. That position may be on any rank of the
context group. All these ranks compute the same loss from the same scores; the gradient reaches the
rank that has the position, and the sample is counted on the first context rank
(`PackedBatch.num_trajectories`)."""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.trainer.batch import PackedBatch


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
