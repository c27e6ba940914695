"""Reads pipes and terminals in the event loop, which goes on while nothing arrives."""

import asyncio
import os


async def read_when_ready(descriptor: int, num_bytes: int) -> bytes:
    """Return what a descriptor has, at most `num_bytes` bytes, as soon as it has some; b"" at its
    end.

    A thread that waits for a silent pipe would hold up the end of the process: asyncio joins its
    threads, and nothing interrupts a read."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
    except PermissionError:  # a regular file: epoll takes none, and reading it does not wait
        return await asyncio.to_thread(os.read, descriptor, num_bytes)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, num_bytes)
