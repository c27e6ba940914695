"""Attention on a CPU of a packed batch whose segments continue shared prefixes.

A query attends to its own segment, causally, and to each whole prefix before it
(`models.shared_prefixes`); the parts are joined by the normalizers of their softmax, forward and
backward as in `models.ring_attention`. The matrix of queries x keys never exists.

Shapes: t tokens, S segments, h query heads, g key/value heads (g divides h), d head size of queries
and keys, e of values."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_r1.models.context_parallel import concat_ranges
from megatron_r1.models.length_buckets import (
    LengthBuckets,
    flash_backward,
    flash_forward,
    repeat_kv,
    sum_kv_gradients,
)
from megatron_r1.models.shared_prefixes import SharedPrefixes


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefixes: SharedPrefixes,
    scale: float,
) -> Tensor:
    """Attend causally within each segment and to all that is before it.

    Args:
        query: (t, h, d).
        key: (t, g, d).
        value: (t, g, e).
        cu_seqlens: (S + 1,) int64, the borders of the segments.
        prefixes: the prefix of each segment.
        scale: the factor of the products of queries and keys.

    Returns:
        (t, h, e)."""
    return _PrefixAttention.apply(query, key, value, _Segments(cu_seqlens, prefixes), scale)


class _Segments:
    """The places of a batch's segments. links: for each prefix the rows of the segments that see
    it, int64, and the rows of its keys: the beginning of one segment."""

    def __init__(self, cu_seqlens: Tensor, prefixes: SharedPrefixes):
        lengths = cu_seqlens.diff()
        self.buckets = LengthBuckets(lengths)
        parent, start = prefixes.parent.tolist(), prefixes.start.tolist()
        starts = cu_seqlens.tolist()
        segments_by_prefix: dict[tuple[int, int], list[int]] = defaultdict(list)
        for segment in range(len(parent)):
            ancestor = segment
            while parent[ancestor] >= 0:
                segments_by_prefix[parent[ancestor], start[ancestor]].append(segment)
                ancestor = parent[ancestor]
        self.links = []
        for (prefix, end), members in segments_by_prefix.items():
            rows = concat_ranges(cu_seqlens[members], lengths[members])
            prefix_rows = slice(starts[prefix], starts[prefix] + end - start[prefix])
            self.links.append((rows, prefix_rows))


class _PrefixAttention(torch.autograd.Function):
    """`prefix_attention`, with the places of its segments.

    Tensors have the query's dtype; sums over segments, and lse, are in fp32 or wider. Saved: query,
    key, value and out, and lse (t, h, 1) over a query's own segment and what is before it."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: _Segments, scale: float
    ) -> Tensor:
        """Return out (t, h, e), joined from the attention to the own segment, o, and to each
        prefix, p, in turn.

            out = exp(lse_o - lse) out_o + exp(lse_p - lse) out_p,  lse = log(exp lse_o + exp lse_p)
        """
        size, accumulation_dtype = _flash_size_and_dtype(query, key, value)
        batches = zip(*(segments.buckets.pad(x, size) for x in (query, key, value)), strict=True)
        segment_results = [
            flash_forward(*_repeated_heads(*batch), 0.0, True, attn_mask=None, scale=scale)
            for batch in batches
        ]
        out = segments.buckets.unpad([part.to(accumulation_dtype) for part, _ in segment_results])
        lse = segments.buckets.unpad(
            [part.to(accumulation_dtype)[..., None] for _, part in segment_results]
        )
        for rows, prefix in segments.links:
            part = _repeated_heads(
                *(_padded_row(x, size) for x in (query[rows], key[prefix], value[prefix]))
            )
            out_p, lse_p = flash_forward(*part, 0.0, False, attn_mask=None, scale=scale)
            out_p = out_p[0].transpose(0, 1).to(accumulation_dtype)
            lse_p = lse_p[0].t()[..., None].to(accumulation_dtype)
            lse_o, total_lse = lse[rows], torch.logaddexp(lse[rows], lse_p)
            out[rows] = out[rows] * (lse_o - total_lse).exp() + out_p * (lse_p - total_lse).exp()
            lse[rows] = total_lse
        out = out[..., : value.shape[2]].to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of query (t, h, d), key (t, g, d) and value (t, g, e) for that of
        out, grad (t, h, e).

        All parts compute their gradients with the joint `out` and `lse` (equations:
        `ring_attention`), and these add up; a prefix's keys and values get those of all its
        segments."""
        query, key, value, out, lse = ctx.saved_tensors
        segments, buckets = ctx.segments, ctx.segments.buckets
        size, accumulation_dtype = _flash_size_and_dtype(query, key, value)
        tensors = [buckets.pad(x, size) for x in (grad, query, key, value, out)]
        segment_lses = [x[..., 0] for x in buckets.pad(lse, 1)]
        segment_gradients: list[list[Tensor]] = [[], [], []]
        for g, q, k, v, o, segment_lse in zip(*tensors, segment_lses, strict=True):
            # A padded query has grad 0, and so any finite lse will do.
            parts = _chunk_gradients((g, q, k, v, o), segment_lse, True, ctx.scale)
            for gradients, part in zip(segment_gradients, parts, strict=True):
                gradients.append(part.to(accumulation_dtype))
        d_query, d_key, d_value = (buckets.unpad(parts) for parts in segment_gradients)
        for rows, prefix in segments.links:
            operands = grad[rows], query[rows], key[prefix], value[prefix], out[rows]
            row_lse = lse[rows][..., 0].t()[None]
            parts = _chunk_gradients(
                [_padded_row(x, size) for x in operands], row_lse, False, ctx.scale
            )
            d_rows, d_prefix_key, d_prefix_value = (
                part[0].transpose(0, 1).to(accumulation_dtype) for part in parts
            )
            d_query[rows] += d_rows
            d_key[prefix] += d_prefix_key
            d_value[prefix] += d_prefix_value
        pairs = (d_query, query), (d_key, key), (d_value, value)
        return *(d[..., : x.shape[2]].to(x.dtype) for d, x in pairs), None, None


def _flash_size_and_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, torch.dtype]:
    """Return the one head size that flash attention takes, and the dtype of sums over chunks."""
    size = max(key.shape[2], value.shape[2])
    return size, torch.promote_types(query.dtype, torch.float32)


def _padded_row(x: Tensor, size: int) -> Tensor:
    """Return (t, heads, …) as (1, heads, t, size), filled with zeros."""
    return torch.nn.functional.pad(x, (0, size - x.shape[2])).transpose(0, 1)[None].contiguous()


def _repeated_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = query.shape[1]
    return query, repeat_kv(key, heads), repeat_kv(value, heads)


def _chunk_gradients(
    tensors: Sequence[Tensor], lse: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    """Return the gradients of query, key and value of one chunk.

    Args:
        tensors: the gradient of the output, query, key, value and output, each (r, heads, w, size).
        lse: (r, h, w), the logarithm of each softmax's sum.
        causal: whether later keys are masked.
        scale: factor of the scores before the softmax."""
    grad, query, key, value, out = tensors
    heads = key.shape[1]
    operands = (grad, *_repeated_heads(query, key, value), out, lse.contiguous())
    parts = flash_backward(*operands, 0.0, causal, attn_mask=None, scale=scale)
    return [parts[0], *(sum_kv_gradients(part, heads) for part in parts[1:])]
