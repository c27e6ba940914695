"""A side thread of a trainer rank that reports the rank's current operation, the collective that it
waits in, and its stacks on request.

The thread has its own connection to the controller, so it answers from any host, and also while
the main thread waits in a collective (which releases the interpreter lock). A rank that does not
answer is stopped, has ended, or holds that lock. When the controller is gone, a rank that waits
for a call ends by itself. The monitor ends one that is stuck in an operation, so that torchrun
restarts all ranks.

The collective is found from stack frames. gloo waits inside the call, so the frames name it. A
call with async_op returns a request at once, and the thread waits where it calls the request's
`wait`; that place is named, with the group if the function there has one. NCCL's calls all return
at once and the thread waits where it next needs a result; then only that place is known, as the
innermost frame."""

from __future__ import annotations

import linecache
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

from megatron_r1.trainer.rank_messages import RankStatus, ThreadStack

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup


C10D = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
# Files in which Megatron waits for earlier requests, outside of torch's functions.
MEGATRON_FILES = (
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)
AXIS_GROUPS = {
    "tensor": "tp",
    "pipeline": "pp",
    "data": "dp",
    "context": "cp",
    "expert": "ep",
    "expert data": "expt_dp",
    "embedding": "embd",
}
"""Name of a parallel axis → the field of Megatron's ProcessGroupCollection."""


def describe_collective(
    innermost: FrameType, groups: ProcessGroupCollection | None = None
) -> str | None:
    """Return a description of the collective that `innermost` waits in, or None.

    Such as "all_reduce among ranks 0, 1 (tensor), asked for by _reduce (mappings.py:35)", or "a
    request among ranks 0, 1 (tensor), waited for by backward (layers.py:630)".

    Args:
        innermost: the innermost frame of a thread.
        groups: the process groups whose axes are named; None before they exist."""
    frame: FrameType | None = innermost
    while frame is not None:
        for files in (C10D, MEGATRON_FILES):
            if _is_in(frame, files):
                return _describe_call(_public_frame(frame, files), groups)
        frame = frame.f_back
    return _describe_request(innermost, groups)


def _describe_request(frame: FrameType, groups: ProcessGroupCollection | None) -> str | None:
    """Return a description of the asynchronous request that `frame` waits for, or None.

    A request does not know its group; it is that of the only group among the frame's variables."""
    import torch.distributed as dist

    if ".wait(" not in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        return None
    values = [*frame.f_locals.values()]
    if not any(isinstance(value, dist.Work) for value in values):
        return None
    process_groups = {value for value in values if isinstance(value, dist.ProcessGroup)}
    ranks = _describe_ranks(process_groups.pop(), groups) if len(process_groups) == 1 else ""
    return f"a request{ranks}, waited for by {_frame_location(frame)}"


def _is_in(frame: FrameType, files: tuple[str, ...]) -> bool:
    return frame.f_code.co_filename.endswith(files)


def _public_frame(frame: FrameType, files: tuple[str, ...]) -> FrameType:
    """Return the frame of the public function: its callees and torch's wrapper around it are in the
    same files."""
    public_frame = frame
    while frame.f_back is not None and _is_in(frame.f_back, files):
        frame = frame.f_back
        if frame.f_code.co_name != "wrapper":
            public_frame = frame
    return public_frame


def _describe_call(frame: FrameType, groups: ProcessGroupCollection | None) -> str:
    caller = frame.f_back
    while caller is not None and (_is_in(caller, C10D) or caller.f_code.co_name == "wrapper"):
        caller = caller.f_back
    words = f"{frame.f_code.co_name}{_describe_group(frame, groups)}"
    if caller is None:
        return words
    return f"{words}, asked for by {_frame_location(caller)}"


def _frame_location(frame: FrameType) -> str:
    """Return the function, file and line, such as "_reduce (mappings.py:35)"."""
    file = frame.f_code.co_filename.rpartition("/")[2]
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"


def _describe_group(frame: FrameType, groups: ProcessGroupCollection | None) -> str:
    """Return " among ranks …" from the function's `group` argument; "" where it is unknown."""
    import torch.distributed as dist

    if "group" not in frame.f_code.co_varnames or not dist.is_initialized():
        return ""
    group = frame.f_locals.get("group")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        return ""
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialized"
    return _describe_ranks(group, groups)


def _describe_ranks(group: ProcessGroup, groups: ProcessGroupCollection | None) -> str:
    """Return " among ranks …" with the axes of the group."""
    import torch.distributed as dist

    ranks, axes = dist.get_process_group_ranks(group), _group_axes(group, groups)
    listing = ", ".join(map(str, ranks[:16])) + (f", … {len(ranks)} in all" if ranks[16:] else "")
    return f" among ranks {listing}" + (f" ({' and '.join(axes)})" if axes else "")


def _group_axes(group: ProcessGroup, groups: ProcessGroupCollection | None) -> list[str]:
    """Return the axes that use this process group; if none does, the axes whose group has the same
    ranks."""
    import torch.distributed as dist

    axes = {axis: getattr(groups, field, None) for axis, field in AXIS_GROUPS.items()}
    # A rank outside an axis has None, or Megatron's placeholder, instead of a group.
    axes = {
        axis: axis_group
        for axis, axis_group in axes.items()
        if isinstance(axis_group, dist.ProcessGroup)
    }
    ranks = dist.get_process_group_ranks(group)
    equal_axes = [
        axis
        for axis, axis_group in axes.items()
        if dist.get_process_group_ranks(axis_group) == ranks
    ]
    return [axis for axis, axis_group in axes.items() if axis_group is group] or equal_axes


MAX_FRAMES = 40
IDLE_STATE = "waiting for the controller"
GRACE_SECONDS = 10.0
"""Time for a rank to end by itself after the controller is gone."""


class RankMonitor:
    """Created on the main thread, whose stack it reports first."""

    def __init__(self, connect: Callable[[], zmq.Socket[bytes]]) -> None:
        """Start the monitor's thread.

        Args:
            connect: opens the monitor's connection; called in the monitor's thread."""
        self._connect = connect
        self._main = threading.get_ident()
        self._is_stopping = False
        self.groups: ProcessGroupCollection | None = None
        """Once they exist, the groups whose axes a status names."""
        self.enter("starting")
        threading.Thread(target=self._serve_status, name="rank monitor", daemon=True).start()

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
        thread_ids = sorted(frames.keys() - {self._main, threading.get_ident()})
        threads = [
            ThreadStack(
                names.get(i, str(i)),
                _stack_lines(frames[i]),
                describe_collective(frames[i], self.groups),
            )
            for i in (self._main, *thread_ids)
            if i in frames
        ]
        operation, start = self._operation
        return RankStatus(request, operation, time.monotonic() - start, threads)

    def _serve_status(self) -> None:
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
            main_thread = self.status().threads[0]
            print(
                f"the controller is gone; in {main_thread.collective or main_thread.frames[-1]}",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(1)  # not sys.exit: that ends this thread only


def _stack_lines(innermost: FrameType) -> list[str]:
    summary = traceback.StackSummary.extract(traceback.walk_stack(innermost), limit=MAX_FRAMES)
    frames = [frame for frame in reversed(summary) if not frame.filename.startswith("<frozen")]
    return [f"{_shorten_path(f.filename)}:{f.lineno} in {f.name}: {f.line}" for f in frames]


def _shorten_path(path: str) -> str:
    """Return `path` without the folder of the installed packages."""
    return path.rpartition("site-packages/")[2]
