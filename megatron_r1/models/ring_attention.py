"""Causal attention over samples that are split over context-parallel ranks (ring attention, arXiv
2310.01889), on CPU ranks; `context_parallel` has the split.

Queries stay, keys and values go round a ring of ranks, and each query chunk attends to one
arriving chunk at a time. A rank holds its own share of keys and values, and two more while one is
in use and the next arrives. Chunks are joined by the normalizers of their softmax: of chunk c

    lse_c = log Σ_k exp(scale q·k),    out_c = Σ_k exp(scale q·k - lse_c) v_k

and of all chunks that a query sees

    lse = log Σ_c exp(lse_c),          out = Σ_c exp(lse_c - lse) out_c

In the backward pass keys and values go round again, and the gradients of a share go with it. Given
`out` and `lse` of all chunks, the gradients that one chunk computes add up to the whole ones.

Each chunk is computed by PyTorch's flash attention for CPUs, block by block, so that a matrix of
queries x keys never exists. It takes keys and values of one size: the smaller get zeros.

Shapes: t tokens on this rank, h query heads, g key/value heads (g divides h), d head size of
queries and keys, e of values; in a bucket (`length_buckets`) r sequences of w tokens, heads of size
n, the larger of d and e."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.context_parallel import concat_ranges
from megatron_r1.models.length_buckets import (
    LengthBuckets,
    flash_backward,
    flash_forward,
    repeat_kv,
    sum_kv_gradients,
)


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, group: ProcessGroup
) -> Tensor:
    """Attend on the part of a packed batch that this rank of a context-parallel group holds.

    Args:
        query: (t, h, d).
        key: (t, g, d).
        value: (t, g, e).
        cu_seqlens: int64 (S + 1,), of the whole batch.
        scale: the factor of the products of queries and keys.
        group: the context-parallel ranks.

    Returns:
        (t, h, e) in the query's dtype.
    """
    return _RingAttention.apply(
        query, key, value, _ChunkHalves(cu_seqlens, group.size()), scale, group
    )


class _ChunkHalves:
    """The first and the second chunks of all samples on a rank; both have the same lengths."""

    def __init__(self, cu_seqlens: Tensor, num_ranks: int):
        chunk_lengths = cu_seqlens.diff() // (2 * num_ranks)
        starts = cu_seqlens[:-1] // num_ranks
        self.rows = [concat_ranges(starts + half * chunk_lengths, chunk_lengths) for half in (0, 1)]
        self.buckets = LengthBuckets(chunk_lengths)

    def pad(self, x: Tensor, size: int) -> list[list[Tensor]]:
        """Return the batches (r, heads, w, size) of each half of x (t, heads, …)."""
        return [self.buckets.pad(x[rows], size) for rows in self.rows]

    def unpad(self, halves: Sequence[Sequence[Tensor]], size: int) -> Tensor:
        """Return (t, heads, size), the reverse of `pad`."""
        parts = torch.cat([self.buckets.unpad(half)[..., :size] for half in halves])
        return torch.empty_like(parts).index_copy_(0, torch.cat(self.rows), parts)


class _RingAttention(torch.autograd.Function):
    """`ring_attention`, with the halves of its samples.

    Tensors have the query's dtype; sums over chunks and ranks, and lse, are in fp32 or wider.
    Saved, of this rank's tokens: query, key, value, out, and lse (t, h, 1) over all keys that they
    see."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        halves: _ChunkHalves,
        scale: float,
        group: ProcessGroup,
    ) -> Tensor:
        """Return out (t, h, e), the module's sum over chunks c."""
        rank, num_ranks = group.rank(), group.size()
        size = max(key.shape[2], value.shape[2])
        queries = halves.pad(query, size)
        masks = halves.buckets.padding_masks(query.dtype)
        # Sums over chunks are in fp32 at least.
        accumulation_dtype = torch.promote_types(query.dtype, torch.float32)
        merged_chunks: list[list[Any]] = [[None] * len(masks) for _ in queries]  # (out, lse)
        for owner, share in _ring_shares(torch.cat([key, value], 2), group):
            keys = halves.pad(share[..., : key.shape[2]], size)
            values = halves.pad(share[..., key.shape[2] :], size)
            for half, key_half, is_causal in _visible_chunk_pairs(rank, owner, num_ranks):
                for index, q in enumerate(queries[half]):
                    k, v = (repeat_kv(x[key_half][index], q.shape[1]) for x in (keys, values))
                    mask = None if is_causal else masks[index]
                    out, lse = flash_forward(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
                    merged_chunks[half][index] = _merge_chunks(
                        merged_chunks[half][index], out.to(accumulation_dtype), lse
                    )
        out, lse = (
            halves.unpad([[part[n] for part in half] for half in merged_chunks], count)
            for n, count in enumerate((value.shape[2], 1))
        )
        ctx.save_for_backward(query, key, value, out := out.to(query.dtype), lse)
        ctx.halves, ctx.scale, ctx.group = halves, scale, group
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of query (t, h, d), key (t, g, d) and value (t, g, e) for that of
        out, grad (t, h, e).

            dq = scale Σ_k ds k,    dk = scale Σ_q ds q,    dv = Σ_q p grad
            ds = p (grad·v - grad·out),    p = exp(scale q·k - lse)"""
        query, key, value, out, lse = ctx.saved_tensors
        halves, group = ctx.halves, ctx.group
        rank, num_ranks = group.rank(), group.size()
        size = max(key.shape[2], value.shape[2])
        masks = halves.buckets.padding_masks(query.dtype)
        queries, outs, grads = (halves.pad(x, size) for x in (query, out, grad))
        # A padded query has grad 0, and so any finite lse will do.
        lses = [[x[..., 0] for x in half] for half in halves.pad(lse, 1)]
        accumulation_dtype = torch.promote_types(query.dtype, torch.float32)
        d_queries = [
            [torch.zeros_like(q, dtype=accumulation_dtype) for q in half] for half in queries
        ]
        wait_for_share: Callable[[], Tensor] | None = None
        for owner, share in _ring_shares(torch.cat([key, value], 2), group):
            keys = halves.pad(share[..., : key.shape[2]], size)
            values = halves.pad(share[..., key.shape[2] :], size)
            d_keys, d_values = (
                [
                    [torch.zeros_like(x, dtype=accumulation_dtype) for x in half]
                    for half in halves_of_share
                ]
                for halves_of_share in (keys, values)
            )
            for half, key_half, is_causal in _visible_chunk_pairs(rank, owner, num_ranks):
                for index, q in enumerate(queries[half]):
                    k, v = (repeat_kv(x[key_half][index], q.shape[1]) for x in (keys, values))
                    operands = grads[half][index], q, k, v, outs[half][index], lses[half][index]
                    mask = None if is_causal else masks[index]
                    parts = flash_backward(
                        *operands, 0.0, is_causal, attn_mask=mask, scale=ctx.scale
                    )
                    sums = (
                        d_queries[half][index],
                        d_keys[key_half][index],
                        d_values[key_half][index],
                    )
                    for total, part in zip(sums, parts, strict=True):
                        total += sum_kv_gradients(part, total.shape[1])
            d_share = torch.cat(
                [
                    halves.unpad(d_keys, key.shape[2]),
                    halves.unpad(d_values, value.shape[2]),
                ],
                2,
            )
            if wait_for_share is not None:
                d_share += wait_for_share()
            # The gradients follow their share, and so come home after one round.
            wait_for_share = _send_to_next(d_share, group)
        assert wait_for_share is not None, "a group has at least one rank"
        d_key, d_value = wait_for_share().to(key.dtype).split([key.shape[2], value.shape[2]], 2)
        d_query = halves.unpad(d_queries, query.shape[2]).to(query.dtype)
        return d_query, d_key, d_value, None, None, None


def _visible_chunk_pairs(rank: int, owner: int, num_ranks: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (half of the queries, half of the owner's keys, whether they are the same chunk) where
    queries see keys."""
    for half, query_chunk in enumerate((rank, 2 * num_ranks - 1 - rank)):
        for key_half, key_chunk in enumerate((owner, 2 * num_ranks - 1 - owner)):
            if key_chunk <= query_chunk:
                yield half, key_half, key_chunk == query_chunk


def _ring_shares(share: Tensor, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank, its share), this rank's first. The next share arrives while one is in use."""
    rank, num_ranks = group.rank(), group.size()
    for step in range(num_ranks):
        wait_for_share = _send_to_next(share, group) if step < num_ranks - 1 else None
        yield (rank - step) % num_ranks, share
        if wait_for_share is not None:
            share = wait_for_share()


def _send_to_next(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start sending x, contiguous, to the next rank of the ring, and receiving from the previous.

    Returns:
        A function that waits for both and returns what was received."""
    received_x = torch.empty_like(x)
    # Point to point between neighbors in `group`, the context-parallel ranks: an all-gather would
    # hold the keys and values of all ranks at once, here a rank holds two shares next to its own.
    destination, source = (
        dist.get_global_rank(group, (group.rank() + n) % group.size()) for n in (1, -1)
    )
    # Together: over NCCL a send that stands alone blocks the stream until it is received.
    operations = [
        dist.P2POp(dist.isend, x, destination, group),
        dist.P2POp(dist.irecv, received_x, source, group),
    ]
    works = dist.batch_isend_irecv(operations)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received_x

    return wait


def _merge_chunks(
    merged: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the keys of both.

    Args:
        merged: (out, lse) so far, lse with a last dimension; None before the first keys.
        out: (r, h, w, size), the output over other keys.
        lse: (r, h, w), the logarithm of the sum of their exponentials."""
    lse = lse[..., None]
    if merged is None:
        return out, lse
    total_lse = torch.logaddexp(merged[1], lse)
    return merged[0] * (merged[1] - total_lse).exp() + out * (lse - total_lse).exp(), total_lse
