"""Context parallelism of packed batches: the tokens that a rank holds, and, on CPU ranks, causal
attention over samples that are split over ranks (ring attention, arXiv 2310.01889).

A causal query late in a sample costs more than an early one, so each sample is cut into 2 n equal
chunks for n ranks, and rank r holds chunks r and 2 n - 1 - r (Transformer Engine's split): ranks
have equally many tokens and equal work. A rank's tokens are its two chunks of the first sample,
then those of the second, and so on: a packed batch whose cu_seqlens are the global ones divided by
the number of ranks.

Queries stay, keys and values go round a ring of ranks, and each query chunk attends to one
arriving chunk at a time. A rank holds its own share of keys and values, and two more while one is
in use and the next arrives. Chunks are joined by the normalizers of their softmax: of chunk c

    lse_c = log Σ_k exp(scale q·k),    out_c = Σ_k exp(scale q·k - lse_c) v_k

and of all chunks that a query sees

    lse = log Σ_c exp(lse_c),          out = Σ_c exp(lse_c - lse) out_c

In the backward pass keys and values go round again, and the gradients of a share go with it. Given
`out` and `lse` of all chunks, the gradients that one chunk computes add up to the whole ones.

Each chunk is computed by PyTorch's flash attention for CPUs, block by block, so that a matrix of
queries x keys never exists. It takes keys and values of one size: the smaller get zeros. Sequences
of uneven length are computed as a few right-padded batches of nearly equal length
(`LengthBuckets`): 256 of them cost a handful of matrix products and no Python loop; padding stands
behind the real tokens of its own row.

Shapes: t tokens on this rank, h query heads, g key/value heads (g divides h), d head size of
queries and keys, e of values; in a bucket r sequences of w tokens, heads of size n, the larger of
d and e."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def positions_of_rank(cu_seqlens: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Return the positions of the whole batch that `rank` holds, (T / num_ranks,) int64, in order.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T.
        rank: the rank within the context-parallel group.
        num_ranks: the number of ranks of that group.

    Raises:
        ValueError: where num_ranks > 1 and a sample's length is not a multiple of 2 * num_ranks.
    """
    cu_seqlens = cu_seqlens.long()
    if num_ranks == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    lengths = cu_seqlens.diff()
    if (lengths % (2 * num_ranks)).any():
        raise ValueError(
            f"sample lengths {lengths.tolist()[:8]} must be multiples of {2 * num_ranks} to be "
            f"split over {num_ranks} context-parallel ranks: pad them"
        )
    chunk = lengths // (2 * num_ranks)
    first, second = cu_seqlens[:-1] + rank * chunk, cu_seqlens[1:] - (rank + 1) * chunk
    starts = torch.stack([first, second], 1).flatten()
    return concat_ranges(starts, chunk.repeat_interleave(2))


def gathered_order(cu_seqlens: Tensor, num_ranks: int) -> Tensor:
    """Return the index, (T,) int64, that sorts tokens gathered rank after rank by samples.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T.
        num_ranks: the number of ranks of the context-parallel group.
    """
    gathered = torch.cat(
        [positions_of_rank(cu_seqlens, rank, num_ranks) for rank in range(num_ranks)]
    )
    order = torch.empty_like(gathered)
    order[gathered] = torch.arange(len(gathered), device=gathered.device)
    return order


def concat_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return start, start + 1, … start + length - 1 of each span, end to end, (Σ lengths,) int64.

    Args:
        starts: (N,) int64.
        lengths: (N,) int64."""
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = (starts - (ends - lengths)).repeat_interleave(lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift


# Lengths are rounded up to this. 256 sequences of 40-80 tokens, 4 heads of 96: 120 ms forward and
# backward in one bucket, 88 ms in buckets of 16; in buckets of 8 there are more products and no
# gain.
BUCKET_TOKENS = 16


class LengthBuckets:
    """Packed sequences as a few right-padded batches, each of sequences of nearly one length."""

    def __init__(self, lengths: Tensor):
        """Place the tokens of each sequence.

        Args:
            lengths: (S,) int64, tokens per sequence."""
        padded = (lengths + BUCKET_TOKENS - 1) // BUCKET_TOKENS * BUCKET_TOKENS
        order = padded.argsort(stable=True)
        starts = torch.empty_like(padded)
        starts[order] = padded[order].cumsum(0) - padded[order]
        self._slots = concat_ranges(starts, lengths)
        widths, rows = padded.unique(return_counts=True)
        # Sequences without tokens have width 0, and so no bucket.
        shapes = zip(rows.tolist(), widths.tolist(), strict=True)
        self._shapes = [(count, width) for count, width in shapes if width]
        counts = [count for count, _ in self._shapes]
        self._lengths = lengths[order][len(lengths) - sum(counts) :].split(counts)

    def pad(self, x: Tensor, size: int | None = None) -> list[Tensor]:
        """Return packed x (t, h, d) as a batch (rows, h, width, size) per bucket, with zeros where
        it is padded.

        Args:
            x: packed (t, h, d).
            size: the size of the last dimension of the batches, at least d; None: d."""
        sizes = [count * width for count, width in self._shapes]
        size = x.shape[2] if size is None else size
        padded = x.new_zeros(sum(sizes), x.shape[1], size)
        padded[self._slots, :, : x.shape[2]] = x
        parts = zip(padded.split(sizes), self._shapes, strict=True)
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in parts]

    def unpad(self, batches: Sequence[Tensor]) -> Tensor:
        """Return packed (t, h, d): the reverse of `pad`."""
        flat = [batch.transpose(1, 2).flatten(0, 1) for batch in batches]
        return torch.cat(flat).index_select(0, self._slots)

    def padding_masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return, per bucket, what to add to scores so that no query sees padding: -inf there, 0
        elsewhere, (rows, 1, 1, width); None where a bucket has no padding."""
        masks: list[Tensor | None] = []
        for (_, width), lengths in zip(self._shapes, self._lengths, strict=True):
            hidden = torch.arange(width) >= lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            masks.append(mask[:, None, None] if hidden.any() else None)
        return masks


flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
        chunk = cu_seqlens.diff() // (2 * num_ranks)
        starts = cu_seqlens[:-1] // num_ranks
        self.rows = [concat_ranges(starts + half * chunk, chunk) for half in (0, 1)]
        self.buckets = LengthBuckets(chunk)

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
        queries, masks = halves.pad(query, size), halves.buckets.padding_masks(query.dtype)
        # Sums over chunks are in fp32 at least.
        wide = torch.promote_types(query.dtype, torch.float32)
        joined: list[list[Any]] = [[None] * len(masks) for _ in queries]  # (out, lse)
        for owner, share in _ring_shares(torch.cat([key, value], 2), group):
            keys = halves.pad(share[..., : key.shape[2]], size)
            values = halves.pad(share[..., key.shape[2] :], size)
            for half, other, causal in _visible(rank, owner, num_ranks):
                for at, q in enumerate(queries[half]):
                    k, v = (repeat_kv(x[other][at], q.shape[1]) for x in (keys, values))
                    mask = None if causal else masks[at]
                    out, lse = flash_forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
                    joined[half][at] = _merge_chunks(joined[half][at], out.to(wide), lse)
        out, lse = (
            halves.unpad([[part[n] for part in half] for half in joined], count)
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
        size, masks = max(key.shape[2], value.shape[2]), halves.buckets.padding_masks(query.dtype)
        queries, outs, grads = (halves.pad(x, size) for x in (query, out, grad))
        # A padded query has grad 0, and so any finite lse will do.
        normalizers = [[x[..., 0] for x in half] for half in halves.pad(lse, 1)]
        wide = torch.promote_types(query.dtype, torch.float32)
        d_queries = [[torch.zeros_like(q, dtype=wide) for q in half] for half in queries]
        arriving: Callable[[], Tensor] | None = None
        for owner, share in _ring_shares(torch.cat([key, value], 2), group):
            keys = halves.pad(share[..., : key.shape[2]], size)
            values = halves.pad(share[..., key.shape[2] :], size)
            d_keys, d_values = (
                [[torch.zeros_like(x, dtype=wide) for x in half] for half in halves_of_share]
                for halves_of_share in (keys, values)
            )
            for half, other, causal in _visible(rank, owner, num_ranks):
                for at, q in enumerate(queries[half]):
                    k, v = (repeat_kv(x[other][at], q.shape[1]) for x in (keys, values))
                    row = (grads[half][at], q, k, v, outs[half][at], normalizers[half][at])
                    mask = None if causal else masks[at]
                    parts = flash_backward(*row, 0.0, causal, attn_mask=mask, scale=ctx.scale)
                    sums = d_queries[half][at], d_keys[other][at], d_values[other][at]
                    for whole, part in zip(sums, parts, strict=True):
                        whole += sum_kv_gradients(part, whole.shape[1])
            d_share = torch.cat(
                [
                    halves.unpad(d_keys, key.shape[2]),
                    halves.unpad(d_values, value.shape[2]),
                ],
                2,
            )
            if arriving is not None:
                d_share += arriving()
            # The gradients follow their share, and so come home after one round.
            arriving = _send_to_next(d_share, group)
        assert arriving is not None, "a group has at least one rank"
        d_key, d_value = arriving().to(key.dtype).split([key.shape[2], value.shape[2]], 2)
        d_query = halves.unpad(d_queries, query.shape[2]).to(query.dtype)
        return d_query, d_key, d_value, None, None, None


def _visible(rank: int, owner: int, num_ranks: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (half of the queries, half of the owner's keys, whether they are the same chunk) where
    queries see keys."""
    for half, own in enumerate((rank, 2 * num_ranks - 1 - rank)):
        for other, number in enumerate((owner, 2 * num_ranks - 1 - owner)):
            if number <= own:
                yield half, other, number == own


def _ring_shares(share: Tensor, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank, its share), this rank's first. The next share arrives while one is in use."""
    rank, num_ranks = group.rank(), group.size()
    for step in range(num_ranks):
        arriving = _send_to_next(share, group) if step < num_ranks - 1 else None
        yield (rank - step) % num_ranks, share
        if arriving is not None:
            share = arriving()


def _send_to_next(x: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start sending x, contiguous, to the next rank of the ring, and receiving what the previous
    rank sends; return a function that waits for both and returns what was received."""
    arriving = torch.empty_like(x)
    # Point to point between neighbors in `group`, the context-parallel ranks: an all-gather would
    # hold the keys and values of all ranks at once, here a rank holds two shares next to its own.
    to, of = (dist.get_global_rank(group, (group.rank() + n) % group.size()) for n in (1, -1))
    # Together: over NCCL a send that stands alone blocks the stream until it is received.
    both = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, arriving, of, group)]
    works = dist.batch_isend_irecv(both)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return arriving

    return wait


def _merge_chunks(
    known: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the keys of both.

    Args:
        known: (out, lse) so far, lse with a last dimension; None before the first keys.
        out: (r, h, w, size), the output over other keys.
        lse: (r, h, w), the logarithm of the sum of their exponentials."""
    lse = lse[..., None]
    if known is None:
        return out, lse
    whole = torch.logaddexp(known[1], lse)
    return known[0] * (known[1] - whole).exp() + out * (lse - whole).exp(), whole


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each key/value head for each of its query heads: (r, g, w, n) -> (r, h, w, n)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def sum_kv_gradients(x: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of `repeat_kv`: (r, h, w, n) -> (r, g, w, n)."""
    return x if x.shape[1] == num_heads else x.unflatten(1, (num_heads, -1)).sum(2)
