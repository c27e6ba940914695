"""Packed sequences as right-padded batches for PyTorch's flash attention on CPUs, which takes
batches of one length, and as many heads of keys and values as of queries.

Sequences of uneven length are computed as a few batches of nearly equal length (`LengthBuckets`):
256 of them cost a handful of matrix products and no Python loop; padding stands behind the real
tokens of its own row.

Shapes: t tokens, h query heads, g key/value heads (g divides h), d head size; in a bucket r
sequences of w tokens, heads of size n."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_r1.models.context_parallel import concat_ranges

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

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
        padded_lengths = (lengths + BUCKET_TOKENS - 1) // BUCKET_TOKENS * BUCKET_TOKENS
        order = padded_lengths.argsort(stable=True)
        starts = torch.empty_like(padded_lengths)
        starts[order] = padded_lengths[order].cumsum(0) - padded_lengths[order]
        self._slots = concat_ranges(starts, lengths)
        widths, rows = padded_lengths.unique(return_counts=True)
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
        padded_x = x.new_zeros(sum(sizes), x.shape[1], size)
        padded_x[self._slots, :, : x.shape[2]] = x
        parts = zip(padded_x.split(sizes), self._shapes, strict=True)
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in parts]

    def unpad(self, batches: Sequence[Tensor]) -> Tensor:
        """Return packed (t, h, d): the reverse of `pad`."""
        flat_batches = [batch.transpose(1, 2).flatten(0, 1) for batch in batches]
        return torch.cat(flat_batches).index_select(0, self._slots)

    def padding_masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return, per bucket, what to add to scores so that no query sees padding: -inf there, 0
        elsewhere, (rows, 1, 1, width); None where a bucket has no padding."""
        masks: list[Tensor | None] = []
        for (_, width), lengths in zip(self._shapes, self._lengths, strict=True):
            hidden = torch.arange(width) >= lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            masks.append(mask[:, None, None] if hidden.any() else None)
        return masks


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """Repeat each key/value head for each of its query heads: (r, g, w, n) -> (r, h, w, n)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def sum_kv_gradients(x: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of `repeat_kv`: (r, h, w, n) -> (r, g, w, n)."""
    return x if x.shape[1] == num_heads else x.unflatten(1, (num_heads, -1)).sum(2)
