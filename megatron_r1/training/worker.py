"""What a trainer rank does: joins the grid, then what the controller asks."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from functools import partial
from typing import Any

import msgspec
import zmq

from megatron_r1.config import Config
from megatron_r1.processes.authentication import RANKS_ENVIRONMENT, protect_client
from megatron_r1.training import distributed
from megatron_r1.training.distributed import Place
from megatron_r1.training.rank_monitor import IDLE, RankMonitor
from megatron_r1.training.replica import Replica
from megatron_r1.training.wire import Call, Reply, Share, identity, monitor_identity


def serve_under_torchrun(config: Config, address: str | None) -> None:
    """As `serve`, where only rank 0 knows the controller's address and tells the others."""
    place = distributed.initialize(config.parallel, config.run.seed)
    token = distributed.from_rank_zero(os.environ.get(RANKS_ENVIRONMENT))
    os.environ[RANKS_ENVIRONMENT] = token
    serve(config, distributed.from_rank_zero(address), place)
    distributed.leave()


def serve(config: Config, address: str, place: Place | None = None) -> None:
    """Connect to the controller at `address` (tcp://host:port) and answer until it says "stop".

    A failed operation is answered with its traceback and ends the process: its peers may already be
    waiting in a collective, and only a fresh start brings all ranks to the same place.
    """
    rank = int(os.environ["RANK"])
    socket = _dealer(identity(rank))
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.connect(address)
    witness = RankMonitor(partial(_connected, monitor_identity(rank), address))
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.Decoder(Call).decode

    def reply(result: dict[str, Any]) -> None:
        socket.send(encode(Reply(rank, result)))

    try:
        operations = Operations(
            config, place or distributed.initialize(config.parallel, config.run.seed)
        )
        reply(operations.describe())
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            witness.now_in(IDLE)
            ready = dict(poller.poll())
            if socket not in ready:
                sys.exit(f"trainer rank {rank}: the controller at {address} is gone")
            call = decode(socket.recv())
            witness.now_in(call.operation)
            if call.operation == "stop":
                witness.rest()
                reply({})
                return
            reply(operations.run(call))
    except Exception as error:
        is_mistake = isinstance(error, ValueError)
        told = str(error) if is_mistake else traceback.format_exc()
        socket.send(encode(Reply(rank, None, told, is_mistake)))
        socket.close(linger=5_000)
        raise


def _dealer(name: bytes) -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, name)
    protect_client(socket, os.environ[RANKS_ENVIRONMENT])
    # A controller that vanished without a word is noticed within a minute, on any host.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
    return socket


def _connected(name: bytes, address: str) -> zmq.Socket:
    socket = _dealer(name)
    socket.connect(address)
    return socket


class Operations:
    """The verbs a controller may call; each returns a JSON-like dict."""

    def __init__(self, config: Config, place: Place):
        # Megatron: after the platform is prepared.
        from megatron_r1.training.trainer import Trainer
        from megatron_r1.weight_sync.trainer_rank import WeightPush

        self.place, self.replica = place, Replica(place)
        self.trainer = Trainer(config, self.place)
        self.push = WeightPush(self.trainer.bare, self.trainer.hf, config.parallel)

    def describe(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        return {
            **dataclasses.asdict(self.place),
            "expert_rank": parallel_state.get_expert_model_parallel_rank(),
            "leads_replica": self.replica.leads,
            "num_parameters": self.trainer.num_parameters,
            "score_is_new": self.trainer.score_is_new,
            "process": os.getpid(),
        }

    def run(self, call: Call) -> dict[str, Any]:
        trainer = self.trainer
        if call.operation == "load":
            share = msgspec.msgpack.decode(self.replica.share(call.share), type=Share)
            return trainer.load(share.minibatches)
        if call.operation not in OPERATIONS:
            raise ValueError(f"unknown operation {call.operation!r}: use {', '.join(OPERATIONS)}")
        home = self.push if call.operation in PUSH_OPERATIONS else trainer
        return getattr(home, call.operation)(**call.arguments) or {}


PUSH_OPERATIONS = ("open_push", "connect_engine", "send_weights")
OPERATIONS = (
    "score",
    "token_advantages",
    "agreement",
    "update",
    "values",
    "update_critic",
    "sample_scores",
    "keep_reference",
    *PUSH_OPERATIONS,
    "probe",
    "export",
    "save_checkpoint",
    "checkpoint_progress",
    "verify_checkpoint",
    "load_checkpoint",
)
