"""A linear head, its softmax and its gradients, a chunk of tokens at a time.

logits = hidden @ weight.T exist for one chunk only, in a buffer that every chunk reuses. At hidden
size 7,168, computing them a second time costs a third more time, and writing and reading one chunk
5% (docs/kernels.md), so all work on a chunk is done while it exists.

The statistics of a chunk are gathered over the group while the GPU runs the next product: a chunk's
softmax is read only after the next work is queued."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from r1_kernels.precision import accumulate_product, accumulation_dtype, matmul_into
from r1_kernels.registry import Primitives
from r1_kernels.sampling_mask import KeptIds
from r1_kernels.vocabulary import PendingStatistics, RowSoftmax, RowUpstream, VocabShard

Rows: TypeAlias = slice | Tensor
"""Rows of the batch: slice(first, last + 1), or int64 indices."""

GPU_CHUNK_TOKENS = 8192  # each chunk reads and writes the weight's gradient: a tenth of its product
GPU_CHUNK_ELEMENTS = 1 << 27  # 0.5 GiB of fp32 logits, where the vocabulary's shard is small
CPU_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of fp32 logits; half of it is slower
CHUNK_STEP = 128  # tiles of a product: odd numbers of rows run other kernels, with other bits
ALIGNED_ELEMENTS = 8  # 16 bytes of bf16: products of rows that start elsewhere lose vector loads


@dataclass(frozen=True)
class LinearHead:
    """The output layer of one rank, whose logits are computed in chunks.

    Attributes:
        weight: (V_local, H).
        shard: the vocabulary's columns that the V_local rows of `weight` belong to.
        scale: 1 / temperature.
        chunk_tokens: tokens with logits at once.
        primitives: the kernels that compute log-probabilities from logits, Triton's or plain
            PyTorch's.
        main_grad: (V_local, H) of `accumulation_dtype(weight.dtype)`, to which backward passes add
            the weight's gradient, which is then 0 for autograd; None: autograd gets it.
    """

    weight: Tensor
    shard: VocabShard
    scale: float
    chunk_tokens: int
    primitives: Primitives
    main_grad: Tensor | None = None

    def no_gradient(self) -> Tensor:
        """Return the weight's gradient for autograd where `main_grad` has it.

        It is zeros of the weight's shape in the memory of one."""
        return self.weight.new_zeros(()).expand_as(self.weight)

    def buffer(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Allocate memory for the logits (rows, V_local) of one chunk, each row aligned."""
        num_rows, num_columns = min(num_tokens, self.chunk_tokens), len(self.weight)
        width = -(-num_columns // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
        memory = self.weight.new_empty(num_rows, width, dtype=dtype)
        # oneDNN's product of bf16 rows of odd length reads one element beyond each of them, times
        # 0: a NaN that memory holds by chance would be the result.
        memory[:, num_columns:] = 0
        return memory[:, :num_columns]

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Compute the unscaled logits (rows, V_local) in `buffer`."""
        return matmul_into(buffer[: len(hidden)], hidden, self.weight.t())

    def statistics(
        self, logits: Tensor, targets: Tensor, kept_ids: KeptIds | None
    ) -> PendingStatistics:
        """Start the softmax of a chunk: this rank's statistics, and their all-gather.

        Args:
            logits: (rows, V_local), unscaled.
            targets: (rows,) ids of the whole vocabulary.
            kept_ids: the kept ids of these rows; None: all."""
        local_statistics = shard_statistics(
            self.primitives, logits, targets, self.shard, self.scale, kept_ids
        )
        return PendingStatistics(local_statistics, self.scale, self.shard.group)

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        upstream: RowUpstream,
        kept_ids: KeptIds | None,
        out: Tensor,
    ) -> Tensor:
        """Compute the gradient of the logits in out[:rows].

        Args:
            logits: (rows, V_local), unscaled.
            targets: (rows,) ids of the whole vocabulary.
            upstream: parts of the softmax and the upstream gradients, each (rows,).
            kept_ids: the kept ids of these rows; None: all.
            out: at least `rows` rows of V_local columns; it may be the memory of `logits`.

        Returns:
            out[:rows]."""
        return shard_gradient(
            self.primitives,
            logits=logits,
            targets=targets,
            shard=self.shard,
            scale=self.scale,
            upstream=upstream,
            kept_ids=kept_ids,
            out=out[: len(logits)],
        )

    def chunks(self, rows: Rows) -> Iterator[Rows]:
        """Yield parts of `rows` of nearly equal size.

        A small last chunk would read the whole weight too. If `chunk_tokens` is a multiple of
        `CHUNK_STEP`, so is every chunk but the last.

        Args:
            rows: a range that begins at 0, or indices."""
        count = num_rows(rows)
        step = CHUNK_STEP if self.chunk_tokens % CHUNK_STEP == 0 else 1
        size = -(-count // max(1, -(-count // self.chunk_tokens)))
        size = -(-size // step) * step
        for start in range(0, count, max(1, size)):
            chunk = slice(start, min(start + size, count))
            yield chunk if isinstance(rows, slice) else rows[chunk]


def shard_statistics(
    primitives: Primitives,
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    scale: float,
    kept_ids: KeptIds | None,
) -> Tensor:
    """Compute this shard's statistics of each row, over all its columns or over the kept ones.

    Args:
        primitives: the implementation.
        logits: (rows, V_local), unscaled.
        targets: (rows,) ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        kept_ids: the kept ids of these rows; None: all.

    Returns:
        (4, rows) `vocabulary.STATISTICS`."""
    if kept_ids is None:
        return primitives.row_statistics(logits, targets, shard, scale)
    return primitives.kept_statistics(logits, targets, shard, scale, kept_ids)


def shard_gradient(
    primitives: Primitives,
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    scale: float,
    upstream: RowUpstream,
    kept_ids: KeptIds | None,
    out: Tensor,
) -> Tensor:
    """Write the gradient of the logits to `out`, which may be `logits` itself, and return it.

    Args:
        primitives: the implementation.
        logits: (rows, V_local), unscaled.
        targets: (rows,) ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        upstream: parts of the softmax and the upstream gradients, each (rows,).
        kept_ids: the kept ids of these rows; None: all.
        out: (rows, V_local)."""
    if kept_ids is None:
        return primitives.logits_gradient(logits, targets, shard, scale, upstream, out)
    values = primitives.kept_gradient(logits, targets, shard, scale, upstream, kept_ids)
    return primitives.kept_scatter(values, shard, kept_ids, out)


def num_rows(rows: Rows) -> int:
    """Return how many rows these are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def default_chunk_tokens(weight: Tensor) -> int:
    """Return a number of tokens for products at full rate in a bounded buffer."""
    columns = max(1, len(weight))
    if weight.is_cuda:
        return max(GPU_CHUNK_TOKENS, GPU_CHUNK_ELEMENTS // columns // CHUNK_STEP * CHUNK_STEP)
    return max(16, CPU_CHUNK_ELEMENTS // columns)


def head_softmax(
    head: LinearHead, hidden: Tensor, targets: Tensor, kept_ids: KeptIds | None
) -> RowSoftmax:
    """Compute the softmax of every token, in one product.

    Args:
        head: the output layer.
        hidden: (T, H).
        targets: (T,) ids.
        kept_ids: the ids that each token keeps; None: all."""
    out = RowSoftmax(
        *(
            hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden.dtype))
            for _ in RowSoftmax._fields
        )
    )
    buffer = head.buffer(len(hidden), accumulation_dtype(hidden.dtype))
    pending_store: tuple[Rows, PendingStatistics] | None = None
    for rows in head.chunks(slice(0, len(hidden))):
        chunk_kept_ids = None if kept_ids is None else kept_ids.select(rows)
        statistics = head.statistics(
            head.logits(hidden[rows], buffer), targets[rows], chunk_kept_ids
        )
        if pending_store:
            _store_statistics(out, *pending_store)
        pending_store = rows, statistics
    if pending_store:
        _store_statistics(out, *pending_store)
    return out


def _store_statistics(out: RowSoftmax, rows: Rows, pending: PendingStatistics) -> None:
    for tensor, part in zip(out, pending.wait(), strict=True):
        tensor[rows] = part


class HeadGradients:
    """Gradients of hidden and weight, accumulated chunk by chunk.

    The weight's gradient is accumulated in fp32, in memory of its own or in `main_grad`. The hidden
    states' gradient is one product per chunk, rounded once; with a group it is this rank's part of
    a sum, which is reduced in fp32, chunk by chunk, while later products run.

    Args:
        head: the output layer.
        hidden: (T, H).
        needs_grad: whether hidden and weight need a gradient; one not needed stays None.
        reduce_hidden: whether the hidden states' gradient is summed over the group.
        main_grad: (V_local, H) in fp32, to which the weight's gradient is added; None: to zeros."""

    def __init__(
        self,
        head: LinearHead,
        hidden: Tensor,
        needs_grad: Sequence[bool],
        reduce_hidden: bool,
        main_grad: Tensor | None = None,
    ):
        self.head = head
        self.needed = any(needs_grad[:2])
        self.hidden = torch.zeros_like(hidden) if needs_grad[0] else None
        self.weight = None
        if needs_grad[1]:
            zeros = partial(torch.zeros_like, head.weight, dtype=accumulation_dtype(hidden.dtype))
            self.weight = zeros() if main_grad is None else main_grad
        self.group = head.shard.group if reduce_hidden else None
        self.reducing: tuple[Rows, Tensor, dist.Work] | None = None

    def add(self, rows: Rows, states: Tensor, d_logits: Tensor) -> None:
        """Add a chunk.

        Args:
            rows: those of the chunk.
            states: hidden[rows].
            d_logits: (rows, V_local) in hidden's dtype."""
        if self.weight is not None:
            accumulate_product(self.weight, d_logits.t(), states)
        if self.hidden is None:
            return
        # Padding rows may hold NaN, and 0 times NaN is NaN.
        num_real_columns = self.head.shard.num_real
        d_logits, weight = d_logits[:, :num_real_columns], self.head.weight[:num_real_columns]
        if self.group is None and isinstance(rows, slice):
            torch.mm(d_logits, weight, out=self.hidden[rows])
            return
        if self.group is None:
            self.hidden[rows] = d_logits @ weight
            return
        part = d_logits.new_empty(
            len(d_logits), self.hidden.shape[1], dtype=accumulation_dtype(self.hidden.dtype)
        )
        matmul_into(part, d_logits, weight)
        self._finish_reducing()
        # Over the vocabulary group: each rank has the part from its rows of the weight. The sum
        # travels while the next chunk is computed.
        self.reducing = rows, part, dist.all_reduce(part, group=self.group, async_op=True)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of hidden, in its dtype, and of weight, in fp32.

        The latter has what `main_grad` had before."""
        self._finish_reducing()
        return self.hidden, self.weight

    def _finish_reducing(self) -> None:
        if self.reducing is not None and self.hidden is not None:
            rows, part, work = self.reducing
            work.wait()
            self.hidden[rows] = part.to(self.hidden.dtype)
            self.reducing = None
