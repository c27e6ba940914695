"""Messages between the controller and the trainer ranks: msgpack, no pickles.

Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

MONITOR = b"monitor-"


def identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of a rank's connection for calls and replies."""
    return str(rank).encode()


def monitor_identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of the connection of a rank's `RankMonitor`."""
    return MONITOR + str(rank).encode()


class Sample(msgspec.Struct, frozen=True):
    """A training sample: one prompt with its response.

    token_ids: int32 bytes, prompt then response; logprobs: float32 bytes, the rollout engine's, one
    per response token (empty for SFT); advantage: the same for every response token (GRPO);
    routing: indices [rows, moe layers, topk] of the experts the engine chose, of 1 or 2 bytes each
    (`models.routing_shape`), for the tokens before the last; empty without routing replay; teacher:
    float32 bytes, the teacher's log-probabilities of the response, or None; label: for a reward
    model, 1 for a good text, 0 for a bad one."""

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
        """Encode token ids and floats; ValueError for an empty prompt and unequal lengths."""
        if not len(prompt):
            raise ValueError("a sample needs at least one prompt token")
        if logprobs is not None and len(logprobs) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(logprobs)} logprobs")
        if teacher is not None and len(teacher) != len(response):
            raise ValueError(f"{len(response)} response tokens but {len(teacher)} of the teacher's")
        ids = array("i", [*prompt, *response]).tobytes()
        floats = array("f", logprobs if logprobs is not None else []).tobytes()
        teacher_floats = None if teacher is None else array("f", teacher).tobytes()
        return cls(ids, len(prompt), floats, advantage, routing, teacher_floats, label)

    def __len__(self) -> int:
        return len(self.token_ids) // 4


Share = list[list[list[Sample]]]
"""The samples of one model replica: share[i][m] are those of micro-batch m of optimizer step i."""


class Call(msgspec.Struct, frozen=True):
    """Controller → rank: run `operation` with `arguments`.

    share: an encoded `Share`, for the leader of a replica, which forwards it to the others."""

    operation: str
    arguments: dict[str, Any] = {}
    share: bytes | None = None


class Reply(msgspec.Struct, frozen=True):
    """Rank → controller: the operation's result or error.

    is_mistake: the error is a `UserError`; `error` is then its message, and a traceback otherwise.
    """

    rank: int
    result: dict[str, Any] | None = None
    error: str | None = None
    is_mistake: bool = False


class ThreadAt(msgspec.Struct, frozen=True):
    """The stack of a thread. frames: "file:line in function: source", the innermost last.
    collective: the one it waits in, with its ranks and its caller; None: it is in none."""

    name: str
    frames: list[str]
    collective: str | None = None


class RankStatus(msgspec.Struct, frozen=True):
    """Rank → controller, from the monitor thread: the current operation and for how long it runs.

    question: number of the request that this answers; threads: the main one first."""

    question: int
    operation: str
    seconds: float
    threads: list[ThreadAt]
