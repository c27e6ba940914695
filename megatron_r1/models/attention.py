"""Causal self-attention for the CPU, on padded and packed batches, as Megatron's core attention.

PyTorch's flash attention for CPUs computes it block by block, forward and backward: a matrix of
queries x keys, 17 GB a head at 65,536 tokens, never exists. A packed batch becomes a few padded
ones (`length_buckets.LengthBuckets`): the causal mask alone keeps every real query from seeing
the padding behind it, and no query can see another sequence. Under context parallelism keys and
values go round a ring of ranks (`models.ring_attention`). On a GPU Transformer Engine's attention
takes this place.

`_sink_attention` (gpt-oss) adds a learned sink per head and a window. The sink z of a
head (Megatron's `softmax_offset`) is one more logit of the softmax, with no value:

    out = Σ_k exp(scale q·k) v_k / (exp(z) + Σ_k exp(scale q·k))

PyTorch's flash attention returns lse = log Σ_k exp(scale q·k) with its output; with the normalizer
logaddexp(lse, z) in its place the output shrinks by exp(lse - that), and the same backward kernel,
given both, computes the gradients of queries, keys and values. A query with a window of w tokens
sees its own token and the w - 1 before it. All of these are in the query's block of w tokens or in
the block before, so a sequence of s tokens costs 2 s w products, not s².

Shapes: s tokens, b sequences, t tokens of a packed batch on this rank, h query heads, g key/value
heads (g divides h), d head size of queries and keys, e head size of values. Padded batches have
Megatron's order (s, b, heads, size); packed ones have no b."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_r1.models.length_buckets import LengthBuckets, flash_backward, flash_forward
from megatron_r1.models.prefix_attention import prefix_attention
from megatron_r1.models.ring_attention import ring_attention
from megatron_r1.models.shared_prefixes import marked_prefixes


def _sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sink_logits: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attend causally, with sinks and within a window.

    Args:
        query: (b, h, s, d).
        key: (b, g, s, d).
        value: (b, g, s, d).
        scale: factor of the scores before the softmax.
        sink_logits: (h,), the logit of each head's sink; None: no sinks.
        window: tokens that a query sees, its own included; None: all.

    Returns:
        (b, h, s, d)."""
    heads, length = query.shape[1:3]
    if sink_logits is None:
        sink_logits = query.new_full((heads,), -torch.inf)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if window is None or window >= length:
        return _SinkAttention.apply(query, key, value, sink_logits, None, scale)
    first = (x[:, :, :window] for x in (query, key, value))
    outs = [_SinkAttention.apply(*first, sink_logits, None, scale)]
    # Behind the real tokens, whose queries do not see it.
    query, key, value = (pad(x, (0, 0, 0, -length % window)) for x in (query, key, value))
    queries = _window_blocks(query, window)[:, 1:]
    keys, values = (
        torch.cat([blocks[:, :-1], blocks[:, 1:]], 3)
        for blocks in (_window_blocks(x, window) for x in (key, value))
    )
    rows, columns = torch.arange(window)[:, None], torch.arange(2 * window)
    hidden = (columns <= rows) | (columns > rows + window)
    mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
    out = _SinkAttention.apply(
        *(x.flatten(0, 1) for x in (queries, keys, values)), sink_logits, mask, scale
    )
    outs.append(out.unflatten(0, queries.shape[:2]).transpose(1, 2).flatten(2, 3))
    return torch.cat(outs, 2)[:, :, :length]


def _window_blocks(x: Tensor, size: int) -> Tensor:
    """Cut the sequence into blocks: (b, h, n * size, d) -> (b, n, h, size, d)."""
    return x.unflatten(2, (-1, size)).transpose(1, 2)


class _SinkAttention(torch.autograd.Function):
    """Attention with the logits of sinks (h,), causal or under a mask to add to the scores.

    query (b, h, s, d), key and value (b, h, s', d) of one dtype; mask: (s, s') in it, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logits: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Return out (b, h, s, d), the module's equation; lse is in fp32 or wider."""
        is_causal = mask is None
        out, lse = flash_forward(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        total_lse = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
        out = (out * (lse - total_lse).exp()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sink_logits, mask, out, total_lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of query, key, value and sinks for that of out, grad (b, h, s, d).

        dz = -Σ exp(z - logaddexp(lse, z)) (grad·out), over sequences and queries
        """
        query, key, value, sink_logits, mask, out, total_lse = ctx.saved_tensors
        operands = grad, query, key, value, out, total_lse
        is_causal = mask is None
        parts = flash_backward(*operands, 0.0, is_causal, attn_mask=mask, scale=ctx.scale)
        sink_weight = (sink_logits.to(total_lse.dtype)[:, None] - total_lse).exp()
        d_sink_logits = -(sink_weight * (grad * out).sum(-1)).sum((0, 2)).to(sink_logits.dtype)
        return *parts, d_sink_logits, None, None


class CoreAttention(MegatronModule):
    """Causal attention with the interface of Megatron's DotProductAttention; no dropout.

    Args:
        config: the model's; it says which layers have a window, and whether heads have sinks.
        layer_number: the layer, from 1.
        *positional: further arguments of Megatron's; not used.
        softmax_scale: the factor of query times key; None: 1 / sqrt(`k_channels`).
        k_channels: the size of a head's keys; None: `kv_channels` of the config.
        pg_collection: the groups of context-parallel and of tensor-parallel ranks.
        **unused: further arguments of Megatron's; not used."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *positional: Any,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5
        self.group, self.tensor_group = pg_collection.cp, pg_collection.tp
        has_window = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] + 1 if has_window else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tensor_group.size()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally within each sequence.

        Args:
            query: (s, b, h, d); with packed_seq_params (t, h, d).
            key: (s, b, g, d), or (t, g, d).
            value: (s, b, g, e), or (t, g, e).
            attention_mask: None; the causal mask is built in.
            attn_mask_type: ignored, as the mask is causal.
            attention_bias: None.
            packed_seq_params: its cu_seqlens_q, int32 (sequences + 1,), goes from 0 to the tokens
                of all context-parallel ranks together.

        Returns:
            (s, b, h*e), or (t, h*e)."""
        assert attention_mask is None and attention_bias is None, "only causal masking is built in"
        if packed_seq_params is None:
            assert self.group.size() == 1, "context parallelism works on packed batches"
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = _attend_causally(q, k, v, self.softmax_scale, self.softmax_offset, self.window)
            return out.permute(2, 0, 1, 3).flatten(2)
        prefixes = marked_prefixes(packed_seq_params.cu_seqlens_q)
        cu_seqlens = packed_seq_params.cu_seqlens_q.long()
        if prefixes is not None:
            assert self.softmax_offset is None and self.window is None, "see check_shared_prompts"
            parts = query, key, value, cu_seqlens
            joined_output = prefix_attention(*parts, prefixes, self.softmax_scale)
            return joined_output.flatten(1)
        if self.group.size() > 1:
            parts = query, key, value, cu_seqlens
            return ring_attention(*parts, self.softmax_scale, self.group).flatten(1)
        settings = self.softmax_scale, self.softmax_offset, self.window
        return attend_packed(query, key, value, cu_seqlens.diff(), *settings).flatten(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the attention sinks for a checkpoint, as Megatron's DotProductAttention does.

        Args:
            prefix: what precedes the names.
            sharded_offsets: Megatron's (axis, offset, count) of the pipeline's layers.
            metadata: Megatron's settings of the checkpoint."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    sink_logits: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend causally within each sequence of a packed batch.

    Args:
        query: (t, h, d).
        key: (t, g, d).
        value: (t, g, e).
        lengths: int64, tokens per sequence, summing to t.
        scale: the factor of the products of queries and keys.
        sink_logits: (h,), a logit of each head with no value; None: no such logits.
        window: tokens that a query sees, its own included; None: all.

    Returns:
        (t, h, e) in the query's dtype.
    """
    buckets = LengthBuckets(lengths)
    queries, keys, values = (buckets.pad(x) for x in (query, key, value))
    batches = zip(queries, keys, values, strict=True)
    return buckets.unpad(
        [_attend_causally(q, k, v, scale, sink_logits, window) for q, k, v in batches]
    )


def _attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sink_logits: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attend causally: query (b, h, s, d), key (b, g, s, d), value (b, g, s, e) -> (b, h, s, e)."""
    if sink_logits is not None or window is not None:
        return _sink_attention(query, key, value, scale, sink_logits, window)
    size, value_size = key.shape[3], value.shape[3]
    if size != value_size:
        # Flash attention takes one size. Zeros change no product, and their outputs are cut off.
        max_size = max(size, value_size)
        query, key, value = (pad(x, (0, max_size - x.shape[3])) for x in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
    )
    return out[..., :value_size]
