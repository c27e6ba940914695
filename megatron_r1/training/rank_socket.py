"""The controller's socket: where the ranks come to, with their replies and their whereabouts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterable

import msgspec
import zmq
import zmq.asyncio

from megatron_r1.processes.authentication import protect_server
from megatron_r1.training.wire import (
    WITNESS,
    Call,
    RankStatus,
    Reply,
    identity,
    monitor_identity,
)


class RankSocket:
    """One for the life of a set of ranks; ranks that are started anew come to a new one."""

    def __init__(self, bind: str, token: str) -> None:
        """token: what a rank has to know to be let in."""
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        protect_server(self._socket, token)
        self._socket.bind(bind)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._questions = itertools.count(1)
        self._replies: asyncio.Queue[Reply] = asyncio.Queue()
        self._seen: dict[int, RankStatus] = {}
        self._news = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def send(self, rank: int, call: Call) -> None:
        """Raises zmq.ZMQError where the rank has never come, or is gone."""
        await self._socket.send_multipart([identity(rank), msgspec.msgpack.encode(call)])

    async def reply(self, within_seconds: float) -> Reply | None:
        """The next reply of any rank; None when there is none in time."""
        self._read()
        try:
            async with asyncio.timeout(within_seconds):
                return await self._replies.get()
        except TimeoutError:
            return None

    async def whereabouts(
        self, ranks: Iterable[int], within_seconds: float
    ) -> dict[int, RankStatus]:
        """Where each of `ranks` is; those that do not say so in time are left out."""
        self._read()
        question, asked = next(self._questions), set()
        for rank in ranks:
            with contextlib.suppress(zmq.ZMQError):  # never came, or is gone
                payload = [monitor_identity(rank), str(question).encode()]
                await self._socket.send_multipart(payload)
                asked.add(rank)

        def answers() -> dict[int, RankStatus]:
            seen = self._seen
            return {r: seen[r] for r in asked if r in seen and seen[r].question == question}

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                while len(answers()) < len(asked):
                    self._news.clear()
                    await self._news.wait()
        return answers()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self._socket.close(linger=0)

    def _read(self) -> None:
        """Have one task receive; raises what ended it, if something did."""
        if self._reader is None:
            self._reader = asyncio.create_task(self._receive())
        elif self._reader.done():
            self._reader.result()

    async def _receive(self) -> None:
        decode_reply = msgspec.msgpack.Decoder(Reply).decode
        decode_whereabouts = msgspec.msgpack.Decoder(RankStatus).decode
        while True:
            sender, payload = await self._socket.recv_multipart()
            if sender.startswith(WITNESS):
                rank = int(sender.removeprefix(WITNESS))
                self._seen[rank] = decode_whereabouts(payload)
                self._news.set()
            else:
                self._replies.put_nowait(decode_reply(payload))
