"""Prefixes that several sequences of a packed batch share: their layout, and its mark on a batch.

A prefix is the beginning of a segment of the batch. A segment that continues it has only the tokens
after it, sees the prefix's keys besides its own, and its positions go on after the prefix; the
segment that it continues may itself continue another, so that the turns of a tree are each there
once. `SharedPrefixes` is all that both need. Every layer but attention works on tokens alone, so a
prompt of which there are 16 responses costs one pass, and its gradient is the sum of theirs.

Attention to prefixes is `models.prefix_attention` on a CPU; on a GPU `models.te_prefix_attention`
hands Transformer Engine the keys of whole sequences.

Shapes: S segments."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_PREFIXES, _WHOLE = "shared_prefixes", "whole_sequences"


class SharedPrefixes(NamedTuple):
    """The prefixes that the segments of a batch continue.

    Attributes:
        parent: (S,) int64, the earlier segment that has the tokens before each segment, or -1.
        start: (S,) int64, the position of each segment's first token in its sequence: the tokens
            before it, which its ancestors have; 0 without a parent. It is larger than the
            parent's."""

    parent: Tensor
    start: Tensor


class WholeSequences(NamedTuple):
    """The sequences of segments with all that is before them, end to end.

    Attributes:
        rows: int64, for every token of every sequence its place in the batch.
        cu_seqlens: (S + 1,) int32, the borders of the sequences.
        longest: tokens of the longest."""

    rows: Tensor
    cu_seqlens: Tensor
    longest: int


def whole_sequences(cu_seqlens: Tensor, prefixes: SharedPrefixes) -> WholeSequences:
    """Return the whole sequences of a batch's segments, on the host.

    Args:
        cu_seqlens: (S + 1,) integers on the host, the borders of the segments.
        prefixes: the prefix of each of the S segments, on the host.

    Returns:
        The sequence of each segment, in their order, with the tokens before the segment."""
    sequences: list[Tensor] = []
    borders = pairwise(cu_seqlens.tolist())
    parents, starts = prefixes.parent.tolist(), prefixes.start.tolist()
    for (first, end), parent, start in zip(borders, parents, starts, strict=True):
        prefix_rows = (
            sequences[parent][:start] if parent >= 0 else torch.empty(0, dtype=torch.int64)
        )
        sequences.append(torch.cat([prefix_rows, torch.arange(first, end)]))
    lengths = torch.tensor([0, *map(len, sequences)])
    return WholeSequences(torch.cat(sequences), lengths.cumsum(0).int(), int(lengths.max()))


def mark_prefixes(
    cu_seqlens: Tensor, prefixes: SharedPrefixes, sequences: WholeSequences | None = None
) -> Tensor:
    """Return `cu_seqlens` marked with the prefixes of its segments.

    The mark is on the tensor object, because of all arguments only `cu_seqlens` reaches Megatron's
    rotary embedding.

    Args:
        cu_seqlens: (S + 1,) integers.
        prefixes: the prefix of each of the S segments.
        sequences: their whole sequences on the device of a GPU's attention, which needs them."""
    setattr(cu_seqlens, _PREFIXES, prefixes)
    setattr(cu_seqlens, _WHOLE, sequences)
    return cu_seqlens


def marked_prefixes(cu_seqlens: Tensor) -> SharedPrefixes | None:
    """Return the prefixes that `mark_prefixes` has marked, or None."""
    return getattr(cu_seqlens, _PREFIXES, None)


def whole_sequences_of(cu_seqlens: Tensor) -> WholeSequences | None:
    """Return the whole sequences that `mark_prefixes` has marked, or None."""
    return getattr(cu_seqlens, _WHOLE, None)
