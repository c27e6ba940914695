"""Calls of the controller and replies of the trainer ranks: msgpack, no pickles.

Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

from megatron_r1.base.errors import Cause

MONITOR = b"monitor-"
SUPERVISED = "megatron_r1.trainer.losses:supervised"
"""The loss of sft in `Trainer.update`."""

LOAD, STOP = "load", "stop"
"""The calls that are no `operations`: samples follow the first, and the last ends the rank."""


def identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of a rank's connection for calls and replies."""
    return str(rank).encode()


def monitor_identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of the connection of a rank's `RankMonitor`."""
    return MONITOR + str(rank).encode()


class Call(msgspec.Struct, frozen=True):
    """Controller → rank: run `operation`, a method's name in `trainer.operations`, with
    `arguments`. The leader of a replica gets the parts
    of an encoded `ReplicaSamples` after it, and forwards them to the others."""

    operation: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True):
    """Rank → controller: the operation's result or error.

    is_mistake: the error is a `UserError` with this key and cause; `error` is then its message, and
        a traceback otherwise.
    """

    rank: int
    result: dict[str, Any] | None = None
    error: str | None = None
    is_mistake: bool = False
    key: str = ""
    cause: Cause = Cause.FAILED


class RankDescription(TypedDict):
    """The result of a rank's start (`worker.Operations.describe`): what the controller distributes
    batches by, the rank's place on the grid, and facts of its model."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    expert_rank: int
    data_rank: int
    data_size: int
    last_stage: bool
    leads_replica: bool
    num_parameters: int
    score_is_new: bool
    implementations: dict[str, str]
    process: int


class ThreadAt(msgspec.Struct, frozen=True):
    """The stack of a thread. frames: "file:line in function: source", the innermost last.
    collective: the one it waits in, with its ranks and its caller; None: it is in none."""

    name: str
    frames: list[str]
    collective: str | None = None


class RankStatus(msgspec.Struct, frozen=True):
    """Rank → controller, from the monitor thread: the current operation and for how long it runs.

    request: number of the request that this answers; threads: the main one first."""

    request: int
    operation: str
    seconds: float
    threads: list[ThreadAt]
