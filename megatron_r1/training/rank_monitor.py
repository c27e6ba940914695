"""A side thread of a trainer rank that says where the rank is, also when it is stuck.

The controller asks over a connection of this thread's own, so an answer comes from any host, and
while the main thread waits in a collective (which releases the interpreter lock). A rank that does
not answer has been stopped, is gone, or holds that lock.

When the controller is gone, a rank that waits for it ends by itself; one that is stuck is ended
here, so that torchrun sees it and starts all of them again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

import msgspec
import zmq

from megatron_r1.training.collectives import collective
from megatron_r1.training.wire import RankStatus, ThreadAt

MAX_FRAMES = 40
IDLE = "waiting for the controller"
ALONE_SECONDS = 10.0
"""A rank may go on without a controller: enough to end by itself, if it can."""


class RankMonitor:
    """Made on the main thread, whose state it tells first."""

    def __init__(self, connect: Callable[[], zmq.Socket]) -> None:
        """connect: makes this thread's own connection; called in it."""
        self._connect = connect
        self._main = threading.get_ident()
        self._is_over = False
        self.now_in("starting")
        threading.Thread(target=self._answer, name="witness", daemon=True).start()

    def now_in(self, operation: str) -> None:
        """The main thread begins something else."""
        self._operation = (operation, time.monotonic())

    def rest(self) -> None:
        """The rank ends as it should; the controller may go."""
        self._is_over = True

    def whereabouts(self, question: int = 0) -> RankStatus:
        """Of all threads but the caller's."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        others = sorted(frames.keys() - {self._main, threading.get_ident()})
        threads = [
            ThreadAt(names.get(i, str(i)), _lines(frames[i]), collective(frames[i]))
            for i in (self._main, *others)
            if i in frames
        ]
        operation, since = self._operation
        return RankStatus(question, operation, time.monotonic() - since, threads)

    def _answer(self) -> None:
        socket = self._connect()
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            if socket not in dict(poller.poll()):
                return self._end_alone()
            question = int(socket.recv())
            socket.send(msgspec.msgpack.encode(self.whereabouts(question)))

    def _end_alone(self) -> None:
        time.sleep(ALONE_SECONDS)
        if not self._is_over:
            at = self.whereabouts().threads[0]
            print(f"the controller is gone; in {at.collective or at.frames[-1]}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)


def _lines(innermost: FrameType) -> list[str]:
    summary = traceback.StackSummary.extract(traceback.walk_stack(innermost), limit=MAX_FRAMES)
    shown = [frame for frame in reversed(summary) if not frame.filename.startswith("<frozen")]
    return [f"{_shorten(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in shown]


def _shorten(path: str) -> str:
    """Without what stands before a package."""
    return path.rpartition("site-packages/")[2]
