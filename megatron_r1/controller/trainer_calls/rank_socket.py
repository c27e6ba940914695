"""The controller's socket, which carries calls to the trainer ranks and receives their replies and
their monitors' statuses."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Sequence

import msgspec
import zmq
import zmq.asyncio

from megatron_r1.base.processes.authentication import protect_server
from megatron_r1.trainer.rank_messages import (
    MONITOR,
    RankReply,
    RankStatus,
    monitor_identity,
    rank_identity,
)
from megatron_r1.trainer.training_sample import Buffer

BACKLOG = 4096
"""Connections that may wait to be accepted: two of each rank, which start together."""


class RankSocket:
    """The socket of one set of ranks; restarted ranks connect to a new one."""

    def __init__(self, bind: str, token: str) -> None:
        """Listen for ranks.

        Args:
            bind: the ZeroMQ address to listen on.
            token: authenticates the ranks."""
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, BACKLOG)
        protect_server(self._socket, token)
        self._socket.bind(bind)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._requests = itertools.count(1)
        self._replies: asyncio.Queue[RankReply] = asyncio.Queue()
        self._statuses: dict[int, RankStatus] = {}
        self._status_arrived = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def send(self, rank: int, call: bytes, share: Sequence[Buffer] = ()) -> None:
        """Send an encoded `RankCall` and the parts of an encoded share, without copying them: they
        stay in use until the rank has them.

        Args:
            rank: its number among all trainer ranks.
            call: the `RankCall` as bytes.
            share: the parts of the replica's samples (`encode_samples`); none for other operations.

        Raises:
            zmq.ZMQError: the rank has never connected, or is gone.
        """
        await self._socket.send_multipart([rank_identity(rank), call, *share], copy=not share)

    async def reply(self, within_seconds: float) -> RankReply | None:
        """Return the next reply of any rank; None when there is none in time."""
        self._start_reading()
        try:
            async with asyncio.timeout(within_seconds):
                return await self._replies.get()
        except TimeoutError:
            return None

    async def statuses(self, ranks: Iterable[int], within_seconds: float) -> dict[int, RankStatus]:
        """Return the status of each of `ranks`, without those that do not answer in time."""
        self._start_reading()
        request, requested_ranks = next(self._requests), set()
        for rank in ranks:
            with contextlib.suppress(zmq.ZMQError):  # has never connected, or is gone
                payload = [monitor_identity(rank), str(request).encode()]
                await self._socket.send_multipart(payload)
                requested_ranks.add(rank)

        def answers() -> dict[int, RankStatus]:
            statuses = self._statuses
            return {
                rank: statuses[rank]
                for rank in requested_ranks
                if rank in statuses and statuses[rank].request == request
            }

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                while len(answers()) < len(requested_ranks):
                    self._status_arrived.clear()
                    await self._status_arrived.wait()
        return answers()

    def close(self) -> None:
        """Stop reading and drop what was not sent."""
        if self._reader is not None:
            self._reader.cancel()
        self._socket.close(linger=0)

    def _start_reading(self) -> None:
        """Start the task that receives, once.

        Raises:
            Exception: the error with which the task failed.
        """
        if self._reader is None:
            self._reader = asyncio.create_task(self._receive_messages())
        elif self._reader.done():
            self._reader.result()

    async def _receive_messages(self) -> None:
        decode_reply = msgspec.msgpack.Decoder(RankReply).decode
        decode_status = msgspec.msgpack.Decoder(RankStatus).decode
        while True:
            sender, payload = await self._socket.recv_multipart()
            if sender.startswith(MONITOR):
                rank = int(sender.removeprefix(MONITOR))
                self._statuses[rank] = decode_status(payload)
                self._status_arrived.set()
            else:
                self._replies.put_nowait(decode_reply(payload))
