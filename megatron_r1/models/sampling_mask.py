"""The tokens that an engine's sampler kept at each position of a response, as bytes on their way to
the trainer. No torch or Megatron.

With `rollout.top_p`, `top_k` or `min_p` an engine draws from a part of the vocabulary, and the
trainer's softmax has to be over the same part (`r1_kernels.sampling_mask`, which says why the ids
are listed). The bytes are a count for each token, then the ids of all tokens one after the other,
rising within a token; each an int32. A token that the policy did not sample has none. No bytes at
all: every token was drawn from the whole vocabulary.

Size: 4 (1 + k) bytes a token that keeps k ids; `rollout.top_k` bounds k, but for ties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

Buffer = bytes | memoryview
INT = np.dtype("<i4")


class DecodedMask(NamedTuple):
    """The kept ids of a run of tokens, as the bytes have them: on the host, with counts. The
    kernels have tensors with offsets (`SamplingMask`, `KeptIds`).

    Attributes:
        counts: (T,) int32, ids of each token.
        ids: (sum of counts,) int32."""

    counts: np.ndarray
    ids: np.ndarray

    def encode(self) -> bytes:
        """Return the bytes of these ids."""
        return np.ascontiguousarray(self.counts, INT).tobytes() + (
            np.ascontiguousarray(self.ids, INT).tobytes()
        )

    def slice(self, first: int, end: int) -> DecodedMask:
        """Return the kept ids of the tokens from `first` until `end`."""
        first_id, num_ids = int(self.counts[:first].sum()), int(self.counts[first:end].sum())
        return DecodedMask(self.counts[first:end], self.ids[first_id : first_id + num_ids])

    @property
    def token_of_id(self) -> np.ndarray:
        """(sum of counts,) int64, the index of the token that each id was kept for."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def contains(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return whether each token is among the ids that were kept for it, (T,) bool.

        Args:
            token_ids: (T,) integers, the sampled tokens."""
        token_of_id = self.token_of_id
        is_kept = np.zeros(len(self.counts), bool)
        is_kept[token_of_id[self.ids == np.asarray(token_ids, INT)[token_of_id]]] = True
        return is_kept


def decode_mask(mask: Buffer, num_tokens: int) -> DecodedMask:
    """Return the kept ids that the bytes hold, as views of them.

    Args:
        mask: the bytes; none: no ids for any token.
        num_tokens: the tokens that they are of.

    Raises:
        ValueError: for bytes of other than `num_tokens` tokens."""
    if not mask:
        return DecodedMask(np.zeros(num_tokens, INT), np.zeros(0, INT))
    numbers = np.frombuffer(mask, INT)
    counts, ids = numbers[:num_tokens], numbers[num_tokens:]
    if len(counts) < num_tokens or (counts < 0).any() or int(counts.sum()) != len(ids):
        raise ValueError(
            f"a sampling mask of {len(numbers)} numbers does not fit {num_tokens} tokens, whose "
            f"counts name {int(counts.sum())} ids"
        )
    return DecodedMask(counts, ids)


def slice_mask(mask: Buffer, num_tokens: int, first: int, end: int) -> bytes:
    """Return the mask of some of the tokens; no bytes if there are none for all.

    Args:
        mask: the bytes of all tokens.
        num_tokens: the number of all tokens.
        first: the first token of the result.
        end: the token after the last."""
    return decode_mask(mask, num_tokens).slice(first, end).encode() if mask else b""


def concat_masks(parts: Iterable[tuple[Buffer, int]]) -> bytes:
    """Return the mask of tokens one after the other; no bytes if no part has any.

    Args:
        parts: a mask and its number of tokens, for each run of tokens."""
    parts = list(parts)
    if not any(mask for mask, _ in parts):
        return b""
    decoded_masks = [decode_mask(mask, num_tokens) for mask, num_tokens in parts]
    counts, ids = zip(*decoded_masks, strict=True)
    return DecodedMask(np.concatenate(counts), np.concatenate(ids)).encode()


def check_mask(mask: Buffer, token_ids: Sequence[int], vocab_size: int | None) -> None:
    """Raise ValueError unless every token is among the ids that were kept for it, and these rise
    and are in the vocabulary.

    Args:
        mask: the bytes.
        token_ids: the sampled tokens.
        vocab_size: the size of the vocabulary; None: unknown."""
    decoded_mask = decode_mask(mask, len(token_ids))
    counts, ids = decoded_mask
    if len(ids):
        if ids.min() < 0 or (vocab_size and ids.max() >= vocab_size):
            raise ValueError(f"kept tokens {ids.min()} to {ids.max()} of {vocab_size}")
        if ((np.diff(ids) <= 0) & (np.diff(decoded_mask.token_of_id) == 0)).any():
            raise ValueError("the kept tokens of a position do not rise")
    is_kept = decoded_mask.contains(token_ids)
    if not is_kept.all():
        first = int((~is_kept).argmax())
        raise ValueError(
            f"token {token_ids[first]} is not among the {counts[first]} that its sampler kept: the "
            "engine returns no sampling mask, or another token's; start it with "
            "--return-sampling-mask"
        )


def encode_mask(kept_ids: Sequence[Sequence[int]]) -> bytes:
    """Return the bytes of one list of ids per token, as vLLM's JSON has them."""
    counts = np.array([len(ids) for ids in kept_ids], INT)
    ids = np.fromiter(chain.from_iterable(kept_ids), INT, int(counts.sum()))
    return DecodedMask(counts, ids).encode()
