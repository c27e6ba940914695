"""The messages between the controller and the trainer ranks, and the ZeroMQ identities of the
ranks' connections (msgpack, no pickles).

A call names one of `trainer.operations` and gets a reply; a rank's monitor reports what the rank
is doing. Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

from megatron_r1.base.errors import Cause

MONITOR = b"monitor-"
LOAD, STOP = "load", "stop"
"""The calls that are no `operations`: samples follow the first, and the last ends the rank."""


def rank_identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of a rank's connection for calls and replies."""
    return str(rank).encode()


def monitor_identity(rank: int) -> bytes:
    """Return the ZeroMQ identity of the connection of a rank's `RankMonitor`."""
    return MONITOR + str(rank).encode()


class RankCall(msgspec.Struct, frozen=True):
    """Controller → rank: run `operation`, a method's name in `trainer.operations`, with
    `arguments`. The leader of a replica gets the parts of an encoded `ReplicaSamples` after it, and
    forwards them to the others."""

    operation: str
    arguments: dict[str, Any] = {}


class RankReply(msgspec.Struct, frozen=True):
    """Rank → controller: the operation's result or error.

    Attributes:
        rank: the rank that replies.
        result: the operation's result; None after an error.
        error: the message of a `UserError`, a traceback otherwise; None without an error.
        is_user_error: whether the error is a `UserError`.
        key: the key of a `UserError`.
        cause: the cause of a `UserError`."""

    rank: int
    result: dict[str, Any] | None = None
    error: str | None = None
    is_user_error: bool = False
    key: str = ""
    cause: Cause = Cause.FAILED


class RankDescription(TypedDict):
    """The result of a rank's start (`rank_server.RankServer.describe`): what the controller
    distributes batches by, the rank's place on the grid, and facts of its model.

    Attributes:
        rank: the global rank, from 0.
        tensor_rank: the index in its tensor-parallel group.
        pipeline_rank: its pipeline stage.
        context_rank: the index in its context-parallel group.
        expert_rank: the index in its expert-parallel group.
        data_rank: the index of its model replica.
        data_parallel_size: the number of replicas.
        is_last_stage: whether it computes the loss.
        is_replica_leader: whether it receives the replica's samples.
        num_parameters: the parameters of the whole model.
        has_new_score_head: whether a score head is randomly initialized.
        implementations: the implementation of each part of a step.
        process_id: the process id."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    expert_rank: int
    data_rank: int
    data_parallel_size: int
    is_last_stage: bool
    is_replica_leader: bool
    num_parameters: int
    has_new_score_head: bool
    implementations: dict[str, str]
    process_id: int


class ThreadStack(msgspec.Struct, frozen=True):
    """The stack of a thread.

    Attributes:
        name: Python's name of the thread, such as "MainThread".
        frames: "file:line in function: source", the innermost last.
        collective: the one it waits in, with its ranks and its caller; None: it is in none.
    """

    name: str
    frames: list[str]
    collective: str | None = None


class RankStatus(msgspec.Struct, frozen=True):
    """Rank → controller, from the monitor thread: the current operation and for how long it runs.

    Attributes:
        request: number of the request that this answers.
        operation: what the rank does, such as the operation that it was called for.
        seconds: since the rank began it.
        threads: the main one first.
    """

    request: int
    operation: str
    seconds: float
    threads: list[ThreadStack]
