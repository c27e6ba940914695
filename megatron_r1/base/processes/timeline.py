"""Records what each process of a run does when, for `python tools/bench step --profile`.

Off unless the environment variable MEGATRON_R1_TIMELINE names a folder. Then each process appends
to a file of its own there, FOLDER/PID.jsonl, on CLOCK_MONOTONIC, which the processes of a host
share: spans, [name, start, end], and about twice a second the processor time it has used,
["cpu", time, seconds]. A span's name begins with its role: "controller/…" and "trainer/…" for work,
"phase/…" for what the controller's loop is at, "core/…" and "server/…" in vLLM."""

import asyncio
import functools
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

FOLDER_VARIABLE = "MEGATRON_R1_TIMELINE"
FLUSH_SECONDS = 0.5
STEP_KIND = "step"
CPU_KIND = "cpu"
POINT = "point"
IDLE_SPAN = "controller/idle"
SHORTEST_IDLE = 1e-4
"""Seconds; shorter waits of an event loop count as work."""
Function = TypeVar("Function", bound=Callable[..., Any])
_NOTHING: AbstractContextManager[None] = nullcontext()


class _Writer:
    """The file of this process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{os.getpid()}.jsonl"
        self._lines: list[tuple[str, float, float]] = []
        self._lock, self._next = threading.Lock(), 0.0

    def add(self, name: str, start: float, end: float) -> None:
        self._lines.append((name, start, end))
        if end >= self._next:
            self.flush(end)

    def flush(self, now: float) -> None:
        with self._lock:
            self._next = now + FLUSH_SECONDS
            lines, self._lines = self._lines, []
            lines.append((CPU_KIND, now, time.process_time()))
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


class _Span:
    """Records the time of its block."""

    __slots__ = ("_name", "_start", "_writer")

    def __init__(self, writer: _Writer, name: str) -> None:
        self._writer, self._name = writer, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._writer.add(self._name, self._start, time.monotonic())


@functools.cache
def _process_writer() -> _Writer | None:
    folder = os.environ.get(FOLDER_VARIABLE)
    return _Writer(Path(folder)) if folder else None


os.register_at_fork(after_in_child=_process_writer.cache_clear)


def is_on() -> bool:
    """Return whether this process records."""
    return _process_writer() is not None


def span(name: str) -> AbstractContextManager[None]:
    """Return a context that records its block's time, or does nothing."""
    writer = _process_writer()
    return _NOTHING if writer is None else _Span(writer, name)


def begin_step(number: int) -> None:
    """Record that the controller begins step `number`."""
    if writer := _process_writer():
        now = time.monotonic()
        writer.add(f"{STEP_KIND}/{number}", now, now)


def mark(name: str) -> None:
    """Record that this process has come to a point of its start or end, which is "ROLE/POINT", and
    the processor time that it took until then."""
    if writer := _process_writer():
        now = time.monotonic()
        writer.add(f"{POINT}/{name}", now, now)
        writer.flush(now)


def timed(name: str) -> Callable[[Function], Function]:
    """Return a decorator that records every call of a function as a span."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with span(name):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def time_methods(names: dict[str, tuple[type, str]]) -> None:
    """Record every call of others' methods, if this process records.

    Args:
        names: class and method by the span's name."""
    if is_on():
        for name, (owner, method) in names.items():
            setattr(owner, method, timed(name)(getattr(owner, method)))


def watch_waiting(loop: asyncio.AbstractEventLoop) -> None:
    """Record when an event loop of asyncio waits for its files, if this process records."""
    writer, selector = _process_writer(), getattr(loop, "_selector", None)
    if writer is None or selector is None:
        return
    select = selector.select

    def timed_select(timeout: float | None = None) -> Any:
        start = time.monotonic()
        ready_keys = select(timeout)
        end = time.monotonic()
        if end - start >= SHORTEST_IDLE:
            writer.add(IDLE_SPAN, start, end)
        return ready_keys

    selector.select = timed_select
