"""Causal self-attention for the CPU, on padded and packed batches, as Megatron's core attention.

A packed batch is many short sequences of uneven length, end to end. They are scattered into a few
right-padded batches of nearly equal length, so 256 sequences cost a handful of matrix products and
no Python loop over sequences. Padding stands behind the real tokens of its own row: the causal mask
alone keeps every real query from seeing it, and no query can see another sequence. On a GPU
Transformer Engine's attention takes this place.

Shapes: s tokens, b sequences, t = all tokens of a packed batch, h query heads, g key/value heads (g
divides h), d head size of queries and keys, e head size of values.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Lengths are rounded up to this. 256 sequences of 40-80 tokens, 4 heads of 96: 120 ms forward and
# backward in one bucket, 88 ms in buckets of 16; in buckets of 8 there are more products and no
# gain.
BUCKET_TOKENS = 16


class CoreAttention(MegatronModule):
    """Causal attention with the interface of Megatron's DotProductAttention; no dropout."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally within each sequence.

        query (s, b, h, d), key (s, b, g, d), value (s, b, g, e) give (s, b, h*e); with
        packed_seq_params, query (t, h, d), key (t, g, d), value (t, g, e) give (t, h*e). Sequences
        of the packed batch are delimited by cu_seqlens_q, int32 of (sequences + 1,), from 0 to t.
        """
        assert attention_mask is None and attention_bias is None, "only causal masking is built in"
        if packed_seq_params is None:
            rows = (x.transpose(0, 1) for x in (query, key, value))
            return _attend(*rows, self.softmax_scale).transpose(0, 1).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().long()
        return attend_packed(query, key, value, lengths, self.softmax_scale).flatten(1)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """query (t, h, d), key (t, g, d), value (t, g, e), int64 lengths summing to t -> (t, h, e)."""
    num_tokens = query.shape[0]
    padded = (lengths + BUCKET_TOKENS - 1) // BUCKET_TOKENS * BUCKET_TOKENS
    order = padded.argsort(stable=True)
    row_starts = torch.empty_like(padded)
    row_starts[order] = padded[order].cumsum(0) - padded[order]
    moved_by = row_starts - (lengths.cumsum(0) - lengths)
    places = torch.arange(num_tokens, device=query.device)
    places += moved_by.repeat_interleave(lengths, output_size=num_tokens)

    widths, rows = padded[order].unique_consecutive(return_counts=True)
    widths, sizes = widths.tolist(), (widths * rows).tolist()
    buckets = [
        x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, places, x).split(sizes)
        for x in (query, key, value)
    ]
    attended = [
        _attend(*(x.unflatten(0, (-1, width)) for x in bucket), scale).flatten(0, 1)
        for width, *bucket in zip(widths, *buckets, strict=True)
        if width
    ]
    return torch.cat(attended).index_select(0, places)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (b, s, h, d), key (b, s, g, d), value (b, s, g, e) -> (b, s, h, e)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
