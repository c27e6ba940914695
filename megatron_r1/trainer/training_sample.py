"""A training sample. Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import cast

import msgspec

from megatron_r1.models.sampling_mask import slice_mask

Buffer = bytes | memoryview


class Sample(msgspec.Struct, frozen=True):
    """A training sample: one prompt with its response, or one branch of an episode of several
    turns. Its `bytes` may be views of other memory, or of a file.

    Attributes:
        token_ids: int32 bytes, prompt then response.
        prompt_length: tokens of the prompt; the rest of `token_ids` is the response.
        rollout_logprobs: float32 bytes, the rollout engine's, one per response token; empty for
            SFT.
        outcome_advantage: the advantage by the response's reward, that of every response token or
            what an algorithm's `token_advantages` begin from (there the reward itself where the
            algorithm has no baseline). NaN: the sample is not trained on.
        routing: indices [rows, moe layers, topk] of the experts the engine chose, of 1 or 2 bytes
            each (`models.experts`), for the tokens before the last; empty without replay.
        teacher_logprobs: float32 bytes, the teacher's log-probabilities of the response, or None.
        label: the label for a reward model, 1 for a good text, 0 for a bad one.
        is_sampled: a byte per token of the response, 1 where the policy sampled it and is trained
            on it, 0 where it was given (a tool's result, a user's turn); empty: all were sampled.
        sampling_mask: the tokens that the sampler kept at each of the response's positions
            (`models.sampling_mask`); empty: all.
        weight: the sample's share of its episode's sampled tokens; those of all branches add up to
            1.
        num_responses: how many responses it counts for in a denominator: 1, or 0 for every branch
            of an episode but the first.
    """

    token_ids: bytes
    prompt_length: int
    rollout_logprobs: bytes = b""
    outcome_advantage: float = 0.0
    routing: bytes = b""
    teacher_logprobs: bytes | None = None
    label: float = 0.0
    is_sampled: bytes = b""
    sampling_mask: bytes = b""
    weight: float = 1.0
    num_responses: int = 1

    @classmethod
    def pack(
        cls,
        prompt: Sequence[int],
        response: Sequence[int],
        rollout_logprobs: Sequence[float] | None = None,
        outcome_advantage: float = 0.0,
        routing: Buffer = b"",
        teacher_logprobs: Sequence[float] | None = None,
        label: float = 0.0,
        sampling_mask: Buffer = b"",
    ) -> Sample:
        """Encode token ids and floats, without copies of floats in an array.

        Args:
            prompt: token ids, at least one.
            response: token ids.
            rollout_logprobs: the rollout engine's, one per response token; None for SFT.
            outcome_advantage: `Sample.outcome_advantage`.
            routing: bytes of the experts that the engine chose; empty without replay.
            teacher_logprobs: the teacher's log-probability of each response token, or None.
            label: for a reward model, 1 for a good text, 0 for a bad one.
            sampling_mask: the tokens that the sampler kept at each of the response's positions.

        Raises:
            ValueError: an empty prompt, or unequal lengths."""
        if not len(prompt):
            raise ValueError("a sample needs at least one prompt token")
        if rollout_logprobs is not None and len(rollout_logprobs) != len(response):
            raise ValueError(
                f"{len(response)} response tokens but {len(rollout_logprobs)} logprobs"
            )
        if teacher_logprobs is not None and len(teacher_logprobs) != len(response):
            raise ValueError(
                f"{len(response)} response tokens but {len(teacher_logprobs)} of the teacher's"
            )
        ids = b"".join((_to_bytes("i", prompt), _to_bytes("i", response)))
        floats = _to_bytes("f", rollout_logprobs) if rollout_logprobs is not None else b""
        teacher_floats = None if teacher_logprobs is None else _to_bytes("f", teacher_logprobs)
        rows = cast(bytes, routing)
        encoded_mask = cast(bytes, sampling_mask)
        fields = ids, len(prompt), floats, outcome_advantage, rows, teacher_floats, label
        return cls(*fields, sampling_mask=encoded_mask)

    @classmethod
    def pack_branch(
        cls,
        token_ids: Sequence[int],
        is_sampled: bytes,
        rollout_logprobs: Sequence[float],
        outcome_advantage: float,
        *,
        weight: float,
        num_responses: int,
        routing: Buffer = b"",
        teacher_logprobs: Sequence[float] | None = None,
        sampling_mask: Buffer = b"",
    ) -> Sample:
        """Encode a branch, whose prompt is all that was given before its first sampled token.

        What follows the last one is left out, as nothing is learned from it.

        Args:
            token_ids: the whole branch.
            is_sampled: a byte per token, 1 where it is trained on.
            rollout_logprobs: one per token.
            outcome_advantage: `Sample.outcome_advantage`.
            weight: `Sample.weight`.
            num_responses: `Sample.num_responses`.
            routing: the routing of all tokens but the last.
            teacher_logprobs: one per sampled token.
            sampling_mask: the kept ids of every token, none for those that were given.

        Raises:
            ValueError: the arguments do not fit each other."""
        first, end, count = is_sampled.find(1), is_sampled.rfind(1) + 1, len(token_ids)
        if first < 1 or not count == len(is_sampled) == len(rollout_logprobs):
            raise ValueError(
                f"a branch of {count} tokens has {len(rollout_logprobs)} logprobs and "
                f"{len(is_sampled)} flags, the first sampled token is number {first}: it needs a "
                "prompt"
            )
        if end < count:
            routing = routing[: len(routing) // (count - 1) * (end - 1)]
        is_sampled = is_sampled[first:end]
        if teacher_logprobs is not None:
            sampled_logprobs = iter(teacher_logprobs)
            teacher_logprobs = array(
                "f", [next(sampled_logprobs) if flag else 0.0 for flag in is_sampled]
            )
        prompt, response = token_ids[:first], token_ids[first:end]
        response_mask = slice_mask(sampling_mask, count, first, end)
        sample = cls.pack(
            prompt,
            response,
            rollout_logprobs[first:end],
            outcome_advantage=outcome_advantage,
            routing=routing,
            teacher_logprobs=teacher_logprobs,
            sampling_mask=response_mask,
        )
        # Empty where all was sampled, as of a single turn.
        is_sampled = is_sampled if 0 in is_sampled else b""
        return msgspec.structs.replace(
            sample, is_sampled=is_sampled, weight=weight, num_responses=num_responses
        )

    def __len__(self) -> int:
        return len(self.token_ids) // 4

    @property
    def is_trained(self) -> bool:
        """Whether its response is in the sums and denominators of a loss."""
        return not math.isnan(self.outcome_advantage)


def _to_bytes(typecode: str, numbers: Sequence[float]) -> bytes:
    """Return the bytes of `numbers`: a view where they are an array of that type."""
    if not isinstance(numbers, array) or numbers.typecode != typecode:
        numbers = array(typecode, numbers)
    return cast(bytes, memoryview(numbers).cast("B"))
