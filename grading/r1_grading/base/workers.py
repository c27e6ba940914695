"""A child process that answers in frames of JSON: both ends of its pipes.

The child calls `private_streams` and `encode_frame`; its parent starts it as a `FramedProcess`."""

import asyncio
import contextlib
import os
import struct
import sys
from typing import Any, BinaryIO, Generic, Self, TypeVar

import msgspec

from r1_grading.base.lifetime import kill_group, popen_options

LENGTH_HEADER = struct.Struct("<I")


def encode_frame(message: msgspec.Struct) -> bytes:
    """Return the frame of a message's JSON."""
    return frame_payload(msgspec.json.encode(message))


def frame_payload(payload: bytes) -> bytes:
    """Return a payload as it is sent: its length (uint32, little-endian), then itself."""
    return LENGTH_HEADER.pack(len(payload)) + payload


def private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes away from descriptors 0 and 1.

    Code that the child runs could read or print there."""
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return jobs, replies


START_TIMEOUT_SECONDS = 120.0
TAIL_BYTES = 4096
Reply = TypeVar("Reply")


class WorkerLost(Exception):
    """The process ended, or sent something that is no reply."""


class StderrTail:
    """Reads a stream in a task, so that the child never blocks, and keeps the last bytes."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream, self._tail = stream, b""
        self.task = asyncio.create_task(self._read_tail())

    @property
    def last_line(self) -> str:
        """The last line so far, "" if there is none."""
        return last_line(self._tail, "")

    async def _read_tail(self) -> None:
        while chunk := await self._stream.read(65536):
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]


class FramedProcess(Generic[Reply]):
    """A Python module that runs as a child process and replies in frames.

    The first frame says that the child is ready.

    The child leads a process group of its own, so that `kill` also ends the processes that the
    child has started.

    Args:
        process: the child, with pipes for its input, output and errors.
        reply: the type of the child's replies.
        max_bytes: the bytes of the largest reply."""

    def __init__(
        self, process: asyncio.subprocess.Process, reply: type[Reply], max_bytes: int
    ) -> None:
        assert process.stdin and process.stdout and process.stderr, "started with pipes"
        self.process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._stderr = StderrTail(process.stderr)
        self._decoder, self._max_bytes = msgspec.json.Decoder(reply), max_bytes
        self.greeting: Reply | None = None
        """Its first reply."""
        self._ending: asyncio.Task[int] | None = None

    @classmethod
    async def launch(
        cls, module: str, arguments: list[str], reply: type[Reply], max_bytes: int
    ) -> Self:
        """Return a process that is ready.

        Args:
            module: the Python module to run.
            arguments: its command-line arguments.
            reply: the type of a reply.
            max_bytes: the bytes of the largest reply.

        Raises:
            WorkerLost: the process ended before it was ready; with its last words."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            **popen_options(_worker_environment()) | {"stdin": asyncio.subprocess.PIPE},
        )
        worker = cls(process, reply, max_bytes)
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                worker.greeting = await worker.receive()
        except (WorkerLost, TimeoutError) as error:
            await worker.kill()
            raise WorkerLost(worker.last_words or str(error) or "no message") from None
        except BaseException:
            await worker.kill()
            raise
        return worker

    def send(self, frame: bytes) -> None:
        """Write a frame to the child; a lost child shows at the next `receive`."""
        with contextlib.suppress(ConnectionError):  # `receive` reports the loss
            self._stdin.write(frame)

    async def receive(self) -> Reply:
        """Return the next reply.

        Raises:
            WorkerLost: the process ended, or its reply is malformed or longer than the limit.
        """
        try:
            (num_bytes,) = LENGTH_HEADER.unpack(await self._stdout.readexactly(LENGTH_HEADER.size))
            if num_bytes > self._max_bytes:
                raise WorkerLost(f"a reply of {num_bytes} bytes")
            return self._decoder.decode(await self._stdout.readexactly(num_bytes))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError) as error:
            raise WorkerLost(type(error).__name__) from error

    async def kill(self) -> int:
        """Kill the process and its group; return its exit status. Safe to call again.

        The kill continues when the caller is cancelled: call again to wait for the end."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_process())
        return await asyncio.shield(self._ending)

    @property
    def last_words(self) -> str:
        """The last line that the process wrote to its standard error."""
        return self._stderr.last_line

    async def _end_process(self) -> int:
        kill_group(self.process)
        status = await self.process.wait()
        # A grandchild that left the group may hold the pipes open. Do not wait for it: close the
        # transport, which has no public name.
        await asyncio.wait({self._stderr.task}, timeout=0.2)
        self._stderr.task.cancel()
        transport: Any = vars(self.process)["_transport"]
        transport.close()
        await asyncio.sleep(0)
        return status


def _worker_environment() -> dict[str, str]:
    # One thread per worker: numerical libraries otherwise start one per core and map memory for
    # each. A fixed hash seed: sympy's results may depend on the order of sets.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**threads, "PYTHONHASHSEED": "0", "PYTHONPATH": path}


def last_line(output: bytes, default: str = "no message") -> str:
    """Return the last line of `output` with any text, or `default`."""
    lines = output.decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), default)
