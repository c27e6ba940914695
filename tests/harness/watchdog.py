"""Ends a test that hangs, by what it does and not by how long it takes.

A test makes progress while its process or one that descends from it computes, or waits for a core
that other programs use: on a machine that is twenty times slower it does so all the time. One that
does neither for IDLE_SECONDS hangs: its child processes are killed and the test fails with the
stacks of all threads in its output. One that computes for CPU_SECONDS spins, and ends likewise."""

import contextlib
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from fork_servers import PROCESSES

IDLE_SECONDS = float(os.environ.get("R1_TEST_IDLE_SECONDS", "300"))
"""The longest pause of a test: a fixed sleep of the product, for example a timeout under test."""
CPU_SECONDS = 3000.0
"""Six times what the dearest test takes on two cores of 2023."""
IDLE_FRACTION = 0.1
"""Share of one core below which a window counts as idle: loops that poll take a few percent."""
WINDOW_SECONDS = 10.0
SIGNAL = signal.SIGRTMAX - 1
"""Interrupts the main thread; neither the product nor a library uses it."""
GRACE_SECONDS = 60.0
"""How long a test may take to end after it was interrupted."""
TICKS = os.sysconf("SC_CLK_TCK")


class Hung(BaseException):
    """A test made no progress. No `except Exception` of the product holds it up."""


def interrupt(number: int, frame: object) -> None:
    raise Hung


def activity() -> tuple[float, float]:
    """Return the seconds that this process, its descendants and those of the run's fork servers
    have computed, and the seconds that their threads have waited for a core."""
    roots = [os.getpid(), *map(int, os.environ.get(PROCESSES, "").split())]
    return activity_of([*roots, *(child.pid for root in roots for child in children(root))])


def activity_of(pids: Iterable[int]) -> tuple[float, float]:
    """Return the seconds that these processes have computed, and the seconds that their threads
    have waited for a core."""
    computed = waited = 0.0
    for member in pids:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            computed += sum(map(int, fields[11:15])) / TICKS
            for thread in os.listdir(f"/proc/{member}/task"):
                with contextlib.suppress(OSError):
                    schedule = Path(f"/proc/{member}/task/{thread}/schedstat").read_text()
                    waited += int(schedule.split()[1]) / 1e9
    return computed, waited


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).children(recursive=True)
    return []


class Watchdog:
    """Watches the tests that this process runs, one at a time. Made in the main thread."""

    def __init__(self) -> None:
        self._test: str | None = None
        self._changed = threading.Event()
        self._main = threading.main_thread().ident
        signal.signal(SIGNAL, interrupt)
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self, test: str):
        """Watch `test` inside the block."""
        self._test = test
        self._changed.set()
        try:
            yield
        finally:
            self._test = None
            self._changed.set()

    def _watch(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            if self._test is not None:
                self._watch_test(self._test)

    def _watch_test(self, test: str) -> None:
        start, _ = before = activity()
        at, idle, interrupted = time.monotonic(), 0.0, False
        while not self._changed.wait(WINDOW_SECONDS):
            figures = activity()
            seconds, at = time.monotonic() - at, time.monotonic()
            # Processes that ended and were not waited for take their figures with them.
            active = max(figures[0] - before[0], 0.0) + max(figures[1] - before[1], 0.0)
            before = figures
            idle = idle + seconds if active < IDLE_FRACTION * seconds else 0.0
            if interrupted:
                if idle > GRACE_SECONDS:
                    faulthandler.dump_traceback(file=sys.__stderr__)
                    os._exit(70)
            elif idle > IDLE_SECONDS or figures[0] - start > CPU_SECONDS:
                did = f"idle for {idle:.0f} s" if idle else f"{figures[0] - start:.0f} CPU seconds"
                self._interrupt(f"{test} hangs: {did}")
                interrupted, idle = True, 0.0

    def _interrupt(self, reason: str) -> None:
        sys.stderr.write(f"\n{reason}\n")
        for child in children(os.getpid()):
            with contextlib.suppress(psutil.Error):
                sys.stderr.write(f"{child.pid} {child.status()} {child.cmdline()}\n"[:300])
                child.send_signal(signal.SIGKILL)
        assert self._main is not None
        signal.pthread_kill(self._main, SIGNAL)  # also ends a system call that waits


@functools.cache
def watchdog() -> Watchdog:
    return Watchdog()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch each test that pytest runs."""
    with watchdog().watching(item.nodeid):
        return (yield)
