"""Reading what a person or a pipe writes, so that it never delays the end of the process."""

import asyncio
import os


async def read_when_ready(descriptor: int, num_bytes: int) -> bytes:
    """Return what a descriptor has, at most `num_bytes` bytes, as soon as it has some; b"" at its
    end.

    A thread that waits for a silent pipe would hold up the end of the process: asyncio joins its
    threads, and nothing interrupts a read."""
    loop, readable_event = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(descriptor, readable_event.set)
    except PermissionError:  # a regular file: epoll takes none, and reading it does not wait
        return await asyncio.to_thread(os.read, descriptor, num_bytes)
    try:
        await readable_event.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, num_bytes)
