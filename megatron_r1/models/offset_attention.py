"""Causal attention for the CPU with a learned softmax offset per head and a window (gpt-oss).

The offset z of a head, its attention sink, is one more logit of the softmax, with no value:

    out = Σ_k exp(scale q·k) v_k / (exp(z) + Σ_k exp(scale q·k))

PyTorch's flash attention returns lse = log Σ_k exp(scale q·k) with its output; with the normalizer
logaddexp(lse, z) in its place the output shrinks by exp(lse - that), and the same backward kernel,
given both, computes the gradients of queries, keys and values.

A query with a window of w tokens sees its own token and the w - 1 before it. All of these are in
the query's block of w tokens or in the block before, so a sequence of s tokens costs 2 s w
products, not s².

Shapes: b sequences, s tokens, h query heads, g key/value heads (g divides h), d head size."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def offset_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    offset: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attend causally: query (b, h, s, d), key and value (b, g, s, d) -> (b, h, s, d).

    offset: (h,), None: no sinks. window: tokens that a query sees, its own included; None: all."""
    heads, length = query.shape[1:3]
    if offset is None:
        offset = query.new_full((heads,), -torch.inf)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if window is None or window >= length:
        return _Offset.apply(query, key, value, offset, None, scale)
    first = (x[:, :, :window] for x in (query, key, value))
    outs = [_Offset.apply(*first, offset, None, scale)]
    # Behind the real tokens, whose queries do not see it.
    query, key, value = (pad(x, (0, 0, 0, -length % window)) for x in (query, key, value))
    queries = _blocks(query, window)[:, 1:]
    keys, values = (
        torch.cat([blocks[:, :-1], blocks[:, 1:]], 3)
        for blocks in (_blocks(x, window) for x in (key, value))
    )
    rows, columns = torch.arange(window)[:, None], torch.arange(2 * window)
    hidden = (columns <= rows) | (columns > rows + window)
    mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
    out = _Offset.apply(*(x.flatten(0, 1) for x in (queries, keys, values)), offset, mask, scale)
    outs.append(out.unflatten(0, queries.shape[:2]).transpose(1, 2).flatten(2, 3))
    return torch.cat(outs, 2)[:, :, :length]


def _blocks(x: Tensor, size: int) -> Tensor:
    """Cut the sequence into blocks: (b, h, n * size, d) -> (b, n, h, size, d)."""
    return x.unflatten(2, (-1, size)).transpose(1, 2)


class _Offset(torch.autograd.Function):
    """Attention with an offset (h,), causal or under a mask to add to the scores.

    query (b, h, s, d), key and value (b, h, s', d) of one dtype; mask: (s, s') in it, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Return out (b, h, s, d), the module's equation; lse is in fp32 or wider."""
        causal = mask is None
        out, lse = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        whole = torch.logaddexp(lse, offset.to(lse.dtype)[:, None])
        out = (out * (lse - whole).exp()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, offset, mask, out, whole)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of query, key, value and offset for that of out, grad (b, h, s, d).

        dz = -Σ exp(z - logaddexp(lse, z)) (grad·out), over sequences and queries
        """
        query, key, value, offset, mask, out, whole = ctx.saved_tensors
        row = grad, query, key, value, out, whole
        causal = mask is None
        parts = _backward(*row, 0.0, causal, attn_mask=mask, scale=ctx.scale)
        share = (offset.to(whole.dtype)[:, None] - whole).exp()
        d_offset = -(share * (grad * out).sum(-1)).sum((0, 2)).to(offset.dtype)
        return *parts, d_offset, None, None
