"""A side thread of a trainer rank that reports the rank's current operation and stacks on request.

The thread has its own connection to the controller, so it answers from any host, and also while the
main thread waits in a collective (which releases the interpreter lock). A rank that does not answer
is stopped, has ended, or holds that lock.

When the controller is gone, a rank that waits for a call ends by itself. The monitor ends one that
is stuck in an operation, so that torchrun restarts all ranks."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import zmq

from megatron_r1.trainer.collectives import collective
from megatron_r1.trainer.wire import RankStatus, ThreadAt

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

MAX_FRAMES = 40
IDLE = "waiting for the controller"
GRACE_SECONDS = 10.0
"""Time for a rank to end by itself after the controller is gone."""


class RankMonitor:
    """Created on the main thread, whose stack it reports first."""

    def __init__(self, connect: Callable[[], zmq.Socket]) -> None:
        """connect: opens the monitor's connection; called in the monitor's thread."""
        self._connect = connect
        self._main = threading.get_ident()
        self._is_stopping = False
        self.groups: ProcessGroupCollection | None = None
        """Once they exist, the groups whose axes a status names."""
        self.enter("starting")
        threading.Thread(target=self._serve, name="rank monitor", daemon=True).start()

    def enter(self, operation: str) -> None:
        """Record that the main thread starts `operation`."""
        self._operation = (operation, time.monotonic())

    @property
    def operation(self) -> str:
        """What the main thread does."""
        return self._operation[0]

    def expect_stop(self) -> None:
        """Record that the rank is about to end, so that losing the controller is no failure."""
        self._is_stopping = True

    def status(self, request: int = 0) -> RankStatus:
        """Return the current operation and the stacks of all threads but the caller's."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        others = sorted(frames.keys() - {self._main, threading.get_ident()})
        threads = [
            ThreadAt(names.get(i, str(i)), _lines(frames[i]), collective(frames[i], self.groups))
            for i in (self._main, *others)
            if i in frames
        ]
        operation, since = self._operation
        return RankStatus(request, operation, time.monotonic() - since, threads)

    def _serve(self) -> None:
        socket = self._connect()
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while socket in dict(poller.poll()):
            request = int(socket.recv())
            socket.send(msgspec.msgpack.encode(self.status(request)))
        time.sleep(GRACE_SECONDS)
        if not self._is_stopping:
            at = self.status().threads[0]
            print(f"the controller is gone; in {at.collective or at.frames[-1]}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # not sys.exit: that ends this thread only


def _lines(innermost: FrameType) -> list[str]:
    summary = traceback.StackSummary.extract(traceback.walk_stack(innermost), limit=MAX_FRAMES)
    shown = [frame for frame in reversed(summary) if not frame.filename.startswith("<frozen")]
    return [f"{_shorten(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in shown]


def _shorten(path: str) -> str:
    """Return `path` without the folder of the installed packages."""
    return path.rpartition("site-packages/")[2]
