"""Synthetic engines, HTTP servers that answer every generate call with the same group; synthetic
trainer ranks, ZeroMQ sockets that reply to every call. Many of either are in one process."""

import asyncio
import itertools
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import zmq

from megatron_r1.base.processes.authentication import protect_client
from megatron_r1.engines.server.client import GENERATE
from megatron_r1.engines.server.server import RunningServer
from megatron_r1.trainer.sample import decode_samples
from megatron_r1.trainer.wire import Call, Reply, identity

JSON = "application/json"
AWAKE = b'{"is_sleeping": false}'
METRICS = {"loss": 0.0, "grad_norm": 0.0}


def serve_engines(count: int, bodies: dict[str, Path], urls: Connection, interval: float) -> None:
    """Serve `count` engines in this process until it is killed; send their addresses.

    bodies: files with the reply to a generate call, by media type; a call gets the type that it
    accepts, JSON if it names none. interval: seconds from one reply to the next, of all engines
    together, and from the first call to its reply; 0: every call is answered at once."""
    calls = itertools.count()
    first: list[float] = []

    async def until_due() -> None:
        number = next(calls)
        if number == 0:
            first.append(time.monotonic())
        await asyncio.sleep(first[0] + (number + 1) * interval - time.monotonic())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next((x for x in head.split("\r\n") if x.startswith("content-length:")), ":0")
        await reader.readexactly(int(length.split(":")[1]))
        is_generate = GENERATE in head.partition("\r\n")[0]
        accepted = next((t for t in bodies if t != JSON and f"accept: {t}" in head), JSON)
        body = bodies[accepted] if is_generate else None
        if is_generate:
            await until_due()
        size, media_type = (body.stat().st_size, accepted) if body else (len(AWAKE), JSON)
        lines = ("HTTP/1.1 200 OK", f"Content-Type: {media_type}", f"Content-Length: {size}")
        writer.write("\r\n".join((*lines, "Connection: close\r\n\r\n")).encode())
        if body is None:
            writer.write(AWAKE)
        else:
            await writer.drain()
            with body.open("rb") as file:
                await asyncio.get_running_loop().sendfile(writer.transport, file)
        writer.close()

    async def run() -> None:
        servers = [await asyncio.start_server(answer, "127.0.0.1", 0) for _ in range(count)]
        ports = (server.sockets[0].getsockname()[1] for server in servers)
        urls.send([f"http://127.0.0.1:{port}" for port in ports])
        await asyncio.Event().wait()

    asyncio.run(run())


class SyntheticServer(RunningServer):
    """One of the servers of `serve_engines`, as a fleet uses it."""

    def __init__(self, urls: list[str], *_: Any, **settings: Any) -> None:
        super().__init__(urls.pop())


def serve_ranks(ranks: range, address: str, token: str, world: int, replicas: int) -> None:
    """Be `ranks` of `world` until killed; the first rank of each replica gets its samples."""
    context = zmq.Context(io_threads=1)
    context.max_sockets = len(ranks) + 1
    poller, own = zmq.Poller(), {}
    for rank in ranks:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity(rank))
        protect_client(socket, token)
        socket.connect(address)
        socket.send(msgspec.msgpack.encode(Reply(rank, describe(rank, world, replicas))))
        poller.register(socket, zmq.POLLIN)
        own[socket] = rank
    while True:
        for socket, _ in poller.poll():
            result = receive(socket)
            socket.send(msgspec.msgpack.encode(Reply(own[socket], METRICS | result)))


def describe(rank: int, world: int, replicas: int) -> dict[str, Any]:
    """Return `worker.Operations.describe` of a rank: `replicas` equal blocks of ranks."""
    size = world // replicas
    return {
        "rank": rank,
        "data_rank": rank // size,
        "data_size": replicas,
        "last_stage": rank == world - 1,
        "leads_replica": rank % size == 0,
        "num_parameters": 0,
        "score_is_new": False,
        "process": os.getpid(),
    }


def receive(socket: zmq.Socket) -> dict[str, Any]:
    """Receive a call; return the numbers of samples and tokens that came with it."""
    message, *parts = socket.recv_multipart(copy=False)
    msgspec.msgpack.decode(message.buffer, type=Call)
    if not parts:
        return {}
    share = decode_samples(parts[0].buffer, memoryview(b"".join(p.buffer for p in parts[1:])))
    samples = [sample for step in share for microbatch in step for sample in microbatch]
    return {"samples": len(samples), "tokens": sum(len(sample) for sample in samples)}
