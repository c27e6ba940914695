"""A vocabulary sharded over a process group, and softmax statistics combined over the group.

Each rank holds an equal, contiguous range of columns. For a row of logits z, with c = 1 /
temperature, a rank computes over its own columns (`STATISTICS`):

    peak = max z    total = Σ e^((z - peak) c)    moment = Σ e^((z - peak) c) (z - peak) c
    target_logit = z of the target; 0 where another rank has it, NaN where the sampler cut it

One all-gather of these four numbers per token gives every rank the softmax of the whole row,
combined in rank order: the same bits on every rank and in every run. The peak is kept separate from
the logarithm of the total, because their sum loses digits where logits are large."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_known_equal: WeakKeyDictionary[ProcessGroup, set[tuple[int, int]]] = WeakKeyDictionary()
"""Per group, the (num_columns, vocab_size) with which its ranks were found to agree."""

STATISTICS = ("peak", "total", "moment", "target_logit")


class VocabShard(NamedTuple):
    """The columns of the vocabulary that a rank has."""

    first_column: int
    """Id of the first column."""
    num_columns: int
    """The columns, padding included."""
    num_real: int
    """How many of the columns are vocabulary, not padding."""
    vocab_size: int
    """Ids in the whole vocabulary."""
    group: ProcessGroup | None
    """The ranks that share the vocabulary, or None where one rank has all of it."""

    @classmethod
    def from_columns(
        cls, local: Tensor, num_columns: int, group: ProcessGroup | None, vocab_size: int | None
    ) -> VocabShard:
        """Return this rank's shard of the vocabulary.

        One all-gather per group, num_columns and vocab_size compares the shards, so all ranks must
        change these together: a rank that changes them alone hangs in the all-gather.

        Args:
            local: any tensor on this rank's device.
            num_columns: the columns of this rank, padding included.
            group: the ranks that share the vocabulary; None: this one alone.
            vocab_size: the ids in the whole vocabulary; None: one for each column of all ranks.

        Raises:
            ValueError: the ranks' shards differ, or cannot hold vocab_size ids together."""
        num_ranks = 1 if group is None else dist.get_world_size(group)
        group = group if num_ranks > 1 else None
        first_column = 0 if group is None else num_columns * dist.get_rank(group)
        vocab_size = num_columns * num_ranks if vocab_size is None else vocab_size
        if group is not None:
            _check_equal(local, num_columns, vocab_size, group, num_ranks)
        if not 0 < vocab_size <= num_columns * num_ranks:
            raise ValueError(
                f"vocab_size is {vocab_size}, but {num_ranks} shard(s) of {num_columns} columns "
                f"hold 1 to {num_columns * num_ranks} ids"
            )
        num_real = min(max(vocab_size - first_column, 0), num_columns)
        return cls(first_column, num_columns, num_real, vocab_size, group)


def _check_equal(
    local: Tensor, num_columns: int, vocab_size: int, group: ProcessGroup, num_ranks: int
) -> None:
    """Raise ValueError for unequal shards, which would silently map ids to wrong columns."""
    checked_sizes = _known_equal.setdefault(group, set())
    if (num_columns, vocab_size) in checked_sizes:
        return
    local_sizes = torch.tensor([num_columns, vocab_size], dtype=torch.int64, device=local.device)
    all_sizes = local_sizes.new_empty(2 * num_ranks)
    # Over the vocabulary group: every rank sees all shards, so that all raise together, or none.
    # The host waits for it, which is why a head that was found equal is not asked about again.
    all_gather(all_sizes, local_sizes, group=group)
    shards = {tuple(shard) for shard in all_sizes.view(num_ranks, 2).tolist()}
    if len(shards) > 1:
        raise ValueError(
            f"every rank of the group needs the same columns and vocab_size, got {sorted(shards)}"
        )
    checked_sizes.add((num_columns, vocab_size))


class RowSoftmax(NamedTuple):
    """The softmax of each row over the whole vocabulary, each (T,).

    Attributes:
        logprobs: log p(target), nats.
        entropy: nats.
        peak: the largest logit.
        log_total: the logarithm of Σ e^((z - peak) / temperature)."""

    logprobs: Tensor
    entropy: Tensor
    peak: Tensor
    log_total: Tensor


class RowUpstream(NamedTuple):
    """What the gradient of each row's logits follows from, each (T,) fp32.

    Attributes:
        entropy: nats.
        peak: the largest logit.
        log_total: the logarithm of Σ e^((z - peak) / temperature).
        grad_logprobs: the upstream gradient of log p(target).
        grad_entropy: that of the entropy; None: it has none."""

    entropy: Tensor
    peak: Tensor
    log_total: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor | None


class PendingStatistics:
    """Statistics of a block of rows during their all-gather; other work may run meanwhile.

    Args:
        local: (4, T), this rank's `STATISTICS`, whose all-gather starts.
        scale: 1 / temperature.
        group: the ranks that share the vocabulary; None: this one alone."""

    def __init__(self, local: Tensor, scale: float, group: ProcessGroup | None):
        self.scale = scale
        self.work = None
        self.parts = local[None]
        if group is not None:
            num_ranks = dist.get_world_size(group)
            self.local = local.contiguous()
            self.parts = local.new_empty(num_ranks, *local.shape)
            all_parts = self.parts.view(num_ranks * len(local), -1)
            self.work = all_gather(all_parts, self.local, group=group, async_op=True)

    def wait(self) -> RowSoftmax:
        """Combine the ranks' parts. A row of only -inf has no softmax: NaN."""
        if self.work is None:
            return self._row_softmax(*self.parts[0])
        self.work.wait()
        peaks, totals, moments, target_logits = self.parts.unbind(1)
        peak = peaks.amax(0)
        # A rank with only padding, or only -inf, has peak -inf and total 0: it adds 0.
        shifts = torch.where(torch.isneginf(peaks), 0.0, (peaks - peak) * self.scale)
        decay_factors = shifts.exp()
        total = (decay_factors * totals).sum(0)
        # The floor avoids 0 · -inf for a shard of banned tokens (logits at the lowest fp32).
        moment = (decay_factors * (moments + shifts.clamp(min=-1000.0) * totals)).sum(0)
        return self._row_softmax(peak, total, moment, target_logits.sum(0))

    def _row_softmax(
        self, peak: Tensor, total: Tensor, moment: Tensor, target_logit: Tensor
    ) -> RowSoftmax:
        log_total = total.log()
        logprobs = (target_logit - peak) * self.scale - log_total
        return RowSoftmax(logprobs, log_total - moment / total, peak, log_total)
