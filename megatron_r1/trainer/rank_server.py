"""The main loop of a trainer rank: join the grid, build the trainer, run the controller's calls."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec
import zmq

from megatron_r1.base.errors import UserError
from megatron_r1.base.processes import collective_timeouts, timeline
from megatron_r1.base.processes.authentication import RANKS_TOKEN_VARIABLE, protect_client
from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.trainer import distributed
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.operations import (
    CheckpointOperations,
    EvaluationOperations,
    ModelOperations,
    PushOperations,
    operation_names,
)
from megatron_r1.trainer.rank_messages import (
    LOAD,
    STOP,
    RankCall,
    RankDescription,
    RankReply,
    monitor_identity,
    rank_identity,
)
from megatron_r1.trainer.rank_monitor import IDLE_STATE, RankMonitor, describe_collective
from megatron_r1.trainer.replica import Replica
from megatron_r1.trainer.sample_encoding import decode_samples, split_off_routing

if TYPE_CHECKING:
    from megatron_r1.trainer.offload import Offload
    from megatron_r1.trainer.routing import RoutingScatter

OPERATION_PROTOCOLS: tuple[type, ...] = (
    ModelOperations,
    EvaluationOperations,
    CheckpointOperations,
    PushOperations,
)
"""Each has the operations of one part of a rank, in the order of `operations_by_name`."""


def serve_under_torchrun(config: Config, find_controller: Callable[[], str | None]) -> None:
    """Do as `serve_calls`; rank 0 broadcasts the controller's address and token to the others.

    Args:
        config: the recipe.
        find_controller: called on rank 0; waits until the controller listens and returns its
            address, or None if it has ended: every rank then returns, as none would detect the end
            of a process that it was never connected to."""
    grid_position = distributed.initialize(config.parallel, config.run.seed)
    token = platform.broadcast_from_rank_zero(os.environ.get(RANKS_TOKEN_VARIABLE))
    assert token is not None, "rank 0 sets it when it starts the controller"
    os.environ[RANKS_TOKEN_VARIABLE] = token
    address = platform.broadcast_from_rank_zero(
        find_controller() if grid_position.rank == 0 else None
    )
    if address is not None:
        serve_calls(config, address, grid_position)
    distributed.leave_process_groups()


def serve_calls(config: Config, address: str, grid_position: GridPosition | None = None) -> None:
    """Connect to the controller at `address` (tcp://host:port) and run its calls until `STOP`.

    An operation that fails is answered with the message of a UserError, or else a traceback, and
    ends the process: its peers may already wait in a collective, and only a restart brings all
    ranks back to the same state.

    Args:
        config: the recipe.
        address: tcp://host:port of the controller.
        grid_position: the rank's, where the groups exist; None: they are made here."""
    rank = int(os.environ["RANK"])
    socket = _dealer_socket(rank_identity(rank))
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.connect(address)
    # Before the ranks join each other, so that one that hangs there is seen, too.
    rank_monitor = RankMonitor(partial(_connected_socket, monitor_identity(rank), address))
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.Decoder(RankCall).decode

    def reply(result: dict[str, Any]) -> None:
        socket.send(encode(RankReply(rank, result)))

    try:
        grid_position = grid_position or distributed.initialize(config.parallel, config.run.seed)
        rank_monitor.groups = grid_position.groups
        server = RankServer(config, grid_position)
        timeline.mark("trainer/model built")
        reply({**server.describe()})
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            rank_monitor.enter(IDLE_STATE)
            ready_sockets = dict(poller.poll())
            if socket not in ready_sockets:
                sys.exit(f"trainer rank {rank}: the controller at {address} is gone")
            parts = [part.buffer for part in socket.recv_multipart(copy=False)]
            call = decode(parts[0])
            rank_monitor.enter(call.operation)
            if call.operation == STOP:
                rank_monitor.expect_stop()
                reply({})
                return
            with timeline.span(f"trainer/{call.operation}"):
                result = server.run(call, parts[1:])
            reply(result)
    except Exception as error:
        if isinstance(error, UserError):
            failure = RankReply(rank, None, str(error), True, error.key, error.cause)
        else:
            late_text = _describe_late_ranks(error, rank_monitor, config.parallel.timeout_seconds)
            failure = RankReply(rank, None, late_text + traceback.format_exc())
        socket.send(encode(failure))
        socket.close(linger=5_000)  # the process ends with `raise`: first the message has to leave
        raise


def _describe_late_ranks(error: Exception, monitor: RankMonitor, timeout_seconds: float) -> str:
    """Return a sentence on the collective that other ranks did not come to, if that is the error;
    else nothing."""
    collective = collective_timeouts.collective_wait(str(error), timeout_seconds)
    if collective is None:
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = describe_collective(frames[-1], monitor.groups) or collective
    return (
        f"trainer rank {os.environ['RANK']}, in {monitor.operation!r}, waited for other ranks in "
        f"{place}; {collective_timeouts.timeout_remedy(timeout_seconds)}\n"
    )


def _dealer_socket(name: bytes) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, name)
    protect_client(socket, os.environ[RANKS_TOKEN_VARIABLE])
    # A controller whose host vanished without closing the connection is noticed within a minute.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
    return socket


def _connected_socket(name: bytes, address: str) -> zmq.Socket[bytes]:
    socket = _dealer_socket(name)
    socket.connect(address)
    return socket


class RankServer:
    """Runs what the controller may call: "load" and `operations_by_name`."""

    _scatter: RoutingScatter | None = None
    _offload: Offload | None = None

    def __init__(self, config: Config, grid_position: GridPosition):
        # These import Megatron, which is possible only after platform.prepare_process().
        from megatron_r1.push.rank_push import RankPush
        from megatron_r1.trainer import first_steps, implementations
        from megatron_r1.trainer.checkpoint_manager import CheckpointManager
        from megatron_r1.trainer.evaluation_passes import EvaluationPasses
        from megatron_r1.trainer.routing import RoutingScatter
        from megatron_r1.trainer.trainer import Trainer

        straggler_timeout = timedelta(seconds=config.parallel.timeout_seconds)
        self.grid_position = grid_position
        self.replica = Replica(grid_position, straggler_timeout)
        self.trainer = Trainer(config, grid_position)
        self._offload = self.trainer.offload
        rollout = self.trainer.rollout
        if rollout.routing is not None:
            self._scatter = RoutingScatter(self.replica, rollout.split, rollout.routing)
        self.implementations = implementations.describe_implementations(self.trainer)
        push = RankPush(self.trainer.model_chunks, self.trainer.hf_config, config)
        self._operations = operations_by_name(
            self.trainer, EvaluationPasses(self.trainer), CheckpointManager(self.trainer), push
        )
        self._types = argument_types()
        self._call_kernels_once = cache(partial(first_steps.call_kernels, self.trainer))
        if not config.rollout.colocated:  # else an engine that starts has the memory
            self._call_kernels_once()

    def describe(self) -> RankDescription:
        """Return the reply to the rank's start."""
        return {
            "rank": self.grid_position.rank,
            "tensor_rank": self.grid_position.tensor_rank,
            "pipeline_rank": self.grid_position.pipeline_rank,
            "context_rank": self.grid_position.context_rank,
            "expert_rank": self.grid_position.expert_rank,
            "data_rank": self.grid_position.data_rank,
            "data_parallel_size": self.grid_position.data_parallel_size,
            "is_last_stage": self.grid_position.is_last_stage,
            "is_replica_leader": self.replica.is_leader,
            "num_parameters": self.trainer.num_parameters,
            "has_new_score_head": self.trainer.has_new_score_head,
            "implementations": self.implementations,
            "process_id": os.getpid(),
        }

    def run(self, call: RankCall, share: Sequence[memoryview] = ()) -> dict[str, Any]:
        """Run one operation; its result is JSON-like.

        Args:
            call: the operation and its arguments.
            share: for "load" on the leader of a replica, the parts of
                `sample_encoding.encode_samples`.

        Raises:
            ValueError: for an unknown operation, or an argument of another type."""
        if self._offload is not None:
            self._offload.prepare(call.operation)
        if call.operation == LOAD:
            self._call_kernels_once()
            broadcast, (buffers, routing) = self.replica.broadcast, split_off_routing(share)
            headers, joined_buffers = broadcast(share[:1]), broadcast(buffers)
            samples = decode_samples(headers, joined_buffers, routing)
            return self.trainer.load(samples, self._scatter)
        if call.operation not in self._operations:
            names = ", ".join(self._operations)
            raise ValueError(f"unknown operation {call.operation!r}: use {names}")
        types = self._types[call.operation]
        arguments = {}
        for name, value in call.arguments.items():
            try:
                arguments[name] = msgspec.convert(value, types.get(name, Any))
            except msgspec.ValidationError as error:
                raise ValueError(f"{call.operation}, argument {name}: {error}") from error
        result = self._operations[call.operation](**arguments)
        return msgspec.to_builtins(result) if isinstance(result, msgspec.Struct) else result or {}


def operations_by_name(
    trainer: ModelOperations,
    evaluator: EvaluationOperations,
    checkpoints: CheckpointOperations,
    push: PushOperations,
) -> dict[str, Callable[..., Any]]:
    """Return the operations that the controller may call but "load", by their names.

    Args:
        trainer: has the passes.
        evaluator: has those that train nothing.
        checkpoints: has checkpoints and exports.
        push: has the rank's part of a push."""
    implementations = (trainer, evaluator, checkpoints, push)
    return {
        name: getattr(implementation, name)
        for protocol, implementation in zip(OPERATION_PROTOCOLS, implementations, strict=True)
        for name in sorted(operation_names(protocol))
    }


def argument_types() -> dict[str, dict[str, Any]]:
    """Return the type of each argument of each operation: msgpack carries a mapping or a list."""
    return {
        name: get_type_hints(getattr(protocol, name))
        for protocol in OPERATION_PROTOCOLS
        for name in operation_names(protocol)
    }
