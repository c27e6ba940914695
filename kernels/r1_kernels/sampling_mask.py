"""The tokens that a sampler kept at each position: what top-k, top-p or min-p left of a vocabulary.

A policy that is sampled with such a cut is softmax(logits / temperature) over the tokens it keeps,
and 0 elsewhere. The ids of these tokens are called kept ids, and a `SamplingMask` lists those of
all positions. With it the functions of this package compute that policy's log-probabilities,
entropy and gradient; without it, those of the whole vocabulary ("Keep Sampling Mask" of
DeepSeek-V3.2, arXiv 2512.02556 section 3.1).

The ids are listed, because they must be the sampler's own. A threshold on the logits, 4 bytes a
token, would be compared with logits that differ by rounding, and so keep other tokens at its edge.
A bit per token of the vocabulary is exact too, but takes 16,160 bytes a token for 129,280 ids,
however few are kept; a list takes 4 bytes for each kept id and 8 a token. top_k bounds its
length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1_kernels.arguments import check_same_device, has_trusted_values


class SamplingMask(NamedTuple):
    """The kept ids of T tokens, one token's after the other's.

    Attributes:
        token_ids: (N,) int32 ids of the whole vocabulary, rising within a token.
        offsets: (T + 1,) int64: those of token t are token_ids[offsets[t] : offsets[t + 1]]. A
            token that does not count may have none."""

    token_ids: Tensor
    offsets: Tensor


class KeptIds(NamedTuple):
    """The kept ids of R of the tokens of a `SamplingMask`.

    Those of row r are token_ids[starts[r] : ends[r]].

    Attributes:
        token_ids: (N,) int32 ids of the whole vocabulary.
        starts: (R,) int64, where each row's ids begin.
        ends: (R,) int64, where they end."""

    token_ids: Tensor
    starts: Tensor
    ends: Tensor

    def select(self, rows: slice | Tensor) -> KeptIds:
        """Return the kept ids of these rows.

        Args:
            rows: a range of rows, or (R,) int64 indices."""
        return KeptIds(self.token_ids, self.starts[rows], self.ends[rows])


def check_sampling_mask(
    mask: SamplingMask | None,
    targets: Tensor,
    vocab_size: int,
    counted_rows: Tensor | None = None,
) -> KeptIds | None:
    """Check a mask; return its rows, or None where it leaves out nothing.

    Args:
        mask: the caller's; None: every token keeps the whole vocabulary.
        targets: (T,) the sampled ids, checked.
        vocab_size: the ids in the whole vocabulary.
        counted_rows: (R,) int64 indices of the tokens that must have kept their target; None: all.

    Raises:
        ValueError: other shapes or dtypes; unless `trusted_values`, also offsets out of order, ids
            outside the vocabulary or out of order, and targets that were not kept."""
    if mask is None:
        return None
    token_ids, offsets = mask
    check_same_device(targets=targets, token_ids=token_ids, offsets=offsets)
    if token_ids.dim() != 1 or token_ids.dtype != torch.int32:
        raise ValueError(
            f"sampling_mask.token_ids must be (ids,) int32, got {tuple(token_ids.shape)} "
            f"{token_ids.dtype}"
        )
    if offsets.shape != (len(targets) + 1,) or offsets.dtype != torch.int64:
        raise ValueError(
            f"sampling_mask.offsets must be ({len(targets) + 1},) int64, one more than there are "
            f"tokens, got {tuple(offsets.shape)} {offsets.dtype}"
        )
    rows = KeptIds(token_ids.contiguous(), offsets[:-1], offsets[1:])
    if not has_trusted_values():
        _check_values(mask, targets, vocab_size, counted_rows)
    # As many ids as there are at all: nothing was cut, and the dense kernels have the same bits
    # with and without such a mask.
    return None if len(token_ids) == len(targets) * vocab_size else rows


def _check_values(
    mask: SamplingMask, targets: Tensor, vocab_size: int, counted_rows: Tensor | None
) -> None:
    """Raise ValueError for values that do not fit; reads the device."""
    token_ids, offsets = mask
    lengths = offsets.diff()
    end_offsets = torch.stack([offsets[0], offsets[-1]]).tolist()
    if end_offsets != [0, len(token_ids)] or bool((lengths < 0).any()):
        raise ValueError(
            f"sampling_mask.offsets must rise from 0 to the number of ids, {len(token_ids)}; they "
            f"run from {end_offsets[0]} to {end_offsets[1]}"
            + (", and fall in between" if bool((lengths < 0).any()) else "")
        )
    owner = torch.arange(len(targets), device=offsets.device).repeat_interleave(lengths)
    if len(token_ids):
        low, high = torch.stack(token_ids.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"sampling_mask.token_ids hold {low if low < 0 else high}, the vocabulary has ids "
                f"0 to {vocab_size - 1}"
            )
        is_falling = (token_ids.diff() <= 0) & (owner.diff() == 0)
        if bool(is_falling.any()):
            index = int(is_falling.nonzero()[0, 0])
            raise ValueError(
                f"sampling_mask.token_ids of token {int(owner[index])} hold "
                f"{int(token_ids[index + 1])} after {int(token_ids[index])}: sort the ids of a "
                "token, each once"
            )
    has_target = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    has_target[owner[token_ids == targets[owner]]] = True
    lacks_target = ~has_target if counted_rows is None else ~has_target[counted_rows]
    if bool(lacks_target.any()):
        index = int(
            lacks_target.nonzero()[0, 0] if counted_rows is None else counted_rows[lacks_target][0]
        )
        raise ValueError(
            f"sampling_mask has {int(lengths[index])} ids for token {index}, and its target "
            f"{int(targets[index])} is not among them ({int(lacks_target.sum())} such tokens): a "
            "sampled token is one of those that its sampler kept; mask or leave out the others"
        )
