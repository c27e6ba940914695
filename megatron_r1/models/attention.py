"""Causal self-attention for the CPU, on padded and packed batches, as Megatron's core attention.

A packed batch is many short sequences of uneven length, end to end. They are scattered into a few
right-padded batches of nearly equal length, so 256 sequences cost a handful of matrix products and
no Python loop over sequences. Padding stands behind the real tokens of its own row: the causal mask
alone keeps every real query from seeing it, and no query can see another sequence. On a GPU
Transformer Engine's attention takes this place.

Under context parallelism a rank's queries are two chunks of every sample (`models.context`). Keys
and values of all ranks are gathered, and each chunk attends to the keys up to its own end only: the
work is shared, the memory is not. Every rank holds the keys and values of the whole batch,
T * heads * (d + e) numbers, until the layer's backward pass. Transformer Engine sends them round a
ring of ranks instead.

Shapes: s tokens, b sequences, t tokens of a packed batch on this rank, h query heads, g key/value
heads (g divides h), d head size of queries and keys, e head size of values. Padded batches have
Megatron's order (s, b, heads, size); packed ones have no b."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention

from megatron_r1.models.context import sample_order, spans

# Lengths are rounded up to this. 256 sequences of 40-80 tokens, 4 heads of 96: 120 ms forward and
# backward in one bucket, 88 ms in buckets of 16; in buckets of 8 there are more products and no
# gain.
BUCKET_TOKENS = 16


class CoreAttention(MegatronModule):
    """Causal attention with the interface of Megatron's DotProductAttention; no dropout."""

    def __init__(
        self,
        config,
        *positional,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: ProcessGroupCollection,
        **unused,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5
        self.group = pg_collection.cp

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

        query (s, b, h, d), key (s, b, g, d), value (s, b, g, e) -> (s, b, h*e); with
        packed_seq_params, query (t, h, d), key (t, g, d), value (t, g, e) -> (t, h*e). The borders
        of the packed sequences are cu_seqlens_q, int32 (sequences + 1,), from 0 to the tokens of
        all context-parallel ranks together."""
        assert attention_mask is None and attention_bias is None, "only causal masking is built in"
        if packed_seq_params is None:
            assert self.group.size() == 1, "context parallelism works on packed batches"
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return _attend(q, k, v, self.softmax_scale).transpose(0, 1).flatten(2)
        borders = packed_seq_params.cu_seqlens_q.long()
        if self.group.size() > 1:
            parts = query, key, value, borders
            return attend_split(*parts, self.softmax_scale, self.group).flatten(1)
        return attend_packed(query, key, value, borders.diff(), self.softmax_scale).flatten(1)


def attend_split(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float, group: ProcessGroup
) -> Tensor:
    """Attend on the part of a packed batch that this rank of the context-parallel `group` holds.

    query (t, h, d), key (t, g, d), value (t, g, e) -> (t, h, e). borders: int64 (S + 1,), those of
    the whole batch."""
    rank, ranks = group.rank(), group.size()
    # Over the context group: every rank needs the keys and values of all; in the backward pass
    # their gradients are summed.
    key, value = (
        gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
        for x in (key, value)
    )
    order, chunk = sample_order(borders, ranks), borders.diff() // (2 * ranks)
    attended, rows = [], []
    for half, number in enumerate((rank, 2 * ranks - 1 - rank)):
        own = spans(borders[:-1] // ranks + half * chunk, chunk)
        reach = (number + 1) * chunk
        visible = order[spans(borders[:-1], reach)]
        attended.append(
            attend_packed(query[own], key[visible], value[visible], chunk, scale, reach)
        )
        rows.append(own)
    both = torch.cat(attended)
    return torch.empty_like(both).index_copy(0, torch.cat(rows), both)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attend causally within each sequence of a packed batch.

    query (t, h, d), key (k, g, d), value (k, g, e) -> (t, h, e). lengths: int64, queries per
    sequence, summing to t. key_lengths: keys per sequence, summing to k, none below the queries
    (which are the last ones of their sequence); None: as many as queries."""
    padded = (lengths + BUCKET_TOKENS - 1) // BUCKET_TOKENS * BUCKET_TOKENS
    order = padded.argsort(stable=True)
    widths, bucket, rows = padded.unique(return_inverse=True, return_counts=True)
    slots = _slots(lengths, padded, order)
    if key_lengths is None:
        key_widths, key_slots = widths, slots
        earlier = [None] * len(rows)
    else:
        key_widths = torch.zeros_like(widths).scatter_reduce(0, bucket, key_lengths, "amax")
        key_slots = _slots(key_lengths, key_widths[bucket], order)
        earlier = (key_lengths - lengths)[order].split(rows.tolist())
    buckets = zip(
        _padded(query, slots, widths, rows),
        _padded(key, key_slots, key_widths, rows),
        _padded(value, key_slots, key_widths, rows),
        earlier,
        strict=True,
    )
    attended = [_attend(q, k, v, scale, e).flatten(0, 1) for q, k, v, e in buckets if q.numel()]
    return torch.cat(attended).index_select(0, slots)


def _slots(lengths: Tensor, padded: Tensor, order: Tensor) -> Tensor:
    """Return (t,): the row of each token when sequences lie in `order`, each `padded` long."""
    starts = torch.empty_like(padded)
    starts[order] = padded[order].cumsum(0) - padded[order]
    return spans(starts, lengths)


def _padded(x: Tensor, slots: Tensor, widths: Tensor, rows: Tensor) -> list[Tensor]:
    """Scatter x (t, …) to `slots`; return a right-padded batch (rows, width, …) per bucket."""
    sizes = (widths * rows).tolist()
    spread = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, slots, x)
    shapes = zip(spread.split(sizes), rows.tolist(), widths.tolist(), strict=True)
    return [part.unflatten(0, (count, width)) for part, count, width in shapes]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, earlier: Tensor | None = None
) -> Tensor:
    """Attend causally: query (b, s, h, d), key (b, k, g, d), value (b, k, g, e) -> (b, s, h, e).

    earlier: (b,) int64, keys before the first query; None: none, and k = s."""
    mask = None
    if earlier is not None:
        last_visible = earlier[:, None] + torch.arange(query.shape[1], device=query.device)
        mask = torch.arange(key.shape[1], device=key.device) <= last_visible[:, None, :, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)
