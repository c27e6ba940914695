"""Keeps the end of a child's standard error, for the message of its failure."""

import asyncio

TAIL_BYTES = 4096


class StderrTail:
    """Reads a stream in a task, so that the child never blocks, and keeps the last bytes."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream, self._tail = stream, b""
        self.task = asyncio.create_task(self._read())

    @property
    def last_line(self) -> str:
        """The last line so far, "" if there is none."""
        return last_line(self._tail, "")

    async def _read(self) -> None:
        while chunk := await self._stream.read(65536):
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]


def last_line(output: bytes, default: str = "no message") -> str:
    """Return the last line of `output` with any text, or `default`."""
    lines = output.decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), default)
