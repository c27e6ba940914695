"""What travels between the controller and the trainer ranks: msgpack, no pickles.

Imports neither torch nor Megatron, so that the controller stays light.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

WITNESS = b"witness-"


def identity(rank: int) -> bytes:
    """Of a rank's connection to the controller, for calls and replies."""
    return str(rank).encode()


def monitor_identity(rank: int) -> bytes:
    """Of the connection of a rank's side thread (`training.witness`)."""
    return WITNESS + str(rank).encode()


class Sample(msgspec.Struct, frozen=True):
    """One prompt with its response, as the trainer sees it.

    token_ids: int32 bytes, prompt then response; logprobs: float32 bytes, one per response token,
    the rollout engine's (empty for SFT); advantage: the same for every response token (GRPO);
    routing: indices [rows, moe layers, topk] of the experts the engine chose, of 1 or 2 bytes each
    (`models.routing_shape`), for the tokens up to the last but one; empty without routing replay;
    teacher: float32 bytes, the teacher's log-probabilities of the response; None without one;
    label: of a whole text that a reward model learns from, 1 for a good one, 0 for a bad one.
    """

    token_ids: bytes
    prompt_length: int
    logprobs: bytes = b""
    advantage: float = 0.0
    routing: bytes = b""
    teacher: bytes | None = None
    label: float = 0.0

    @classmethod
    def pack(
        cls,
        prompt: Sequence[int],
        response: Sequence[int],
        logprobs: Sequence[float] | None = None,
        advantage: float = 0.0,
        routing: bytes = b"",
        teacher: Sequence[float] | None = None,
        label: float = 0.0,
    ) -> Sample:
        if not len(prompt):
            raise ValueError("a sample needs at least one prompt token")
        if logprobs is not None and len(logprobs) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(logprobs)} logprobs")
        if teacher is not None and len(teacher) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(teacher)} of the teacher's")
        ids = array("i", [*prompt, *response]).tobytes()
        floats = array("f", logprobs if logprobs is not None else []).tobytes()
        taught = None if teacher is None else array("f", teacher).tobytes()
        return cls(ids, len(prompt), floats, advantage, routing, taught, label)

    def __len__(self) -> int:
        return len(self.token_ids) // 4


class Microbatches(msgspec.Struct, frozen=True):
    """One optimizer step's share of one model replica; samples[m] is micro-batch m."""

    samples: list[list[Sample]]


class Share(msgspec.Struct, frozen=True):
    """What one model replica trains on: minibatches[i] is optimizer step i's."""

    minibatches: list[Microbatches]


class Call(msgspec.Struct, frozen=True):
    """Controller → rank: run `operation` with `arguments`.

    share: an encoded `Share`, for the leader of a replica; the rank passes it on as it is."""

    operation: str
    arguments: dict[str, Any] = {}
    share: bytes | None = None


class Reply(msgspec.Struct, frozen=True):
    """Rank → controller: the operation's result, or what ended it.

    is_mistake: the user's; `error` is then a sentence for them, and a traceback otherwise.
    """

    rank: int
    result: dict[str, Any] | None = None
    error: str | None = None
    is_mistake: bool = False


class ThreadAt(msgspec.Struct, frozen=True):
    """Where a thread of a rank is. frames: "file:line in function: source", the innermost last.
    collective: that it waits in, with the ranks and who asked for it; None: in none."""

    name: str
    frames: list[str]
    collective: str | None = None


class RankStatus(msgspec.Struct, frozen=True):
    """Rank → controller, from a side thread: what it does and since when. question: which one this
    answers; threads: the main one first."""

    question: int
    operation: str
    seconds: float
    threads: list[ThreadAt]
