"""Appends JSON lines to a file in the background, many of them with one fsync."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.base.files.json_lines import append_lines

SHARE_SECONDS = 0.1
"""Least time between two writes of a `LineWriter`: lines added meanwhile share the next fsync."""


class LineWriter:
    """Appends lines in the background: `add` returns at once; lines are durable when `close`
    returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[dict[str, Any]] = []
        self._wake = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Queue a line.

        Raises:
            Exception: the error of an earlier write.
        """
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_pending_lines())
        if self._writing.done():
            self._writing.result()
        self._pending.append(dict(line))
        self._wake.set()

    async def close(self) -> None:
        """Write the lines that are still pending, and end."""
        if self._writing is not None:
            self._writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writing
            self._writing = None
        append_lines(self.path, self._take_pending())

    async def _write_pending_lines(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            # In a thread, and to its end: a line must not be written half, nor twice.
            append = asyncio.to_thread(append_lines, self.path, self._take_pending())
            write_future = asyncio.ensure_future(append)
            try:
                await asyncio.shield(write_future)
            except asyncio.CancelledError:
                await write_future
                raise
            await asyncio.sleep(SHARE_SECONDS)

    def _take_pending(self) -> list[dict[str, Any]]:
        lines, self._pending = self._pending, []
        return lines
