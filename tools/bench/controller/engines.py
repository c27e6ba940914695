"""Synthetic engines: HTTP servers that answer every generate call with the same group."""

import asyncio
import itertools
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_r1.engine.client import GENERATE
from megatron_r1.engine.server import RunningServer

JSON = "application/json"
AWAKE = b'{"is_sleeping": false}'


def serve(count: int, bodies: dict[str, Path], urls: Connection, interval: float) -> None:
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
    """One of the servers of `serve`, as a fleet uses it."""

    def __init__(self, urls: list[str], *_: Any, **settings: Any) -> None:
        super().__init__(urls.pop())
