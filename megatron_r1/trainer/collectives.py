"""Finds the collective that a thread waits in, from its stack frames.

gloo waits inside the call, so the frames name it. A call with async_op returns a request at once,
and the thread waits where it calls the request's `wait`; that place is named, with the group if the
function there has one. NCCL's calls all return at once and the thread waits where it next needs a
result; then only that place is known, as the innermost frame."""

from __future__ import annotations

import linecache
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup

C10D = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
# Files in which Megatron waits for earlier requests, outside of torch's functions.
MEGATRON = (
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)
AXES = {
    "tensor": "tp",
    "pipeline": "pp",
    "data": "dp",
    "context": "cp",
    "expert": "ep",
    "expert data": "expt_dp",
    "embedding": "embd",
}
"""Name of a parallel axis → the field of Megatron's ProcessGroupCollection."""


def collective(innermost: FrameType, groups: ProcessGroupCollection | None = None) -> str | None:
    """Return a description of the collective that `innermost` waits in, or None.

    Such as "all_reduce among ranks 0, 1 (tensor), asked for by _reduce (mappings.py:32)", or
    "a request among ranks 0, 1 (tensor), waited for by backward (layers.py:535)". groups: those
    whose axes are named; None before they exist."""
    frame: FrameType | None = innermost
    while frame is not None:
        for files in (C10D, MEGATRON):
            if _is_in(frame, files):
                return _describe(_outermost(frame, files), groups)
        frame = frame.f_back
    return _request(innermost, groups)


def _request(frame: FrameType, groups: ProcessGroupCollection | None) -> str | None:
    """Return a description of the asynchronous request that `frame` waits for, or None.

    A request does not know its group; it is that of the only group among the frame's variables."""
    import torch.distributed as dist

    if ".wait(" not in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        return None
    values = [*frame.f_locals.values()]
    if not any(isinstance(value, dist.Work) for value in values):
        return None
    among = {value for value in values if isinstance(value, dist.ProcessGroup)}
    shown = _ranks_of(among.pop(), groups) if len(among) == 1 else ""
    return f"a request{shown}, waited for by {_place(frame)}"


def _is_in(frame: FrameType, files: tuple[str, ...]) -> bool:
    return frame.f_code.co_filename.endswith(files)


def _outermost(frame: FrameType, files: tuple[str, ...]) -> FrameType:
    """Return the frame of the public function: its callees and torch's wrapper around it are in the
    same files."""
    public = frame
    while frame.f_back is not None and _is_in(frame.f_back, files):
        frame = frame.f_back
        if frame.f_code.co_name != "wrapper":
            public = frame
    return public


def _describe(frame: FrameType, groups: ProcessGroupCollection | None) -> str:
    caller = frame.f_back
    while caller is not None and (_is_in(caller, C10D) or caller.f_code.co_name == "wrapper"):
        caller = caller.f_back
    words = f"{frame.f_code.co_name}{_among(frame, groups)}"
    if caller is None:
        return words
    return f"{words}, asked for by {_place(caller)}"


def _place(frame: FrameType) -> str:
    """Return the function, file and line, such as "_reduce (mappings.py:32)"."""
    file = frame.f_code.co_filename.rpartition("/")[2]
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"


def _among(frame: FrameType, groups: ProcessGroupCollection | None) -> str:
    """Return " among ranks …" from the function's `group` argument; "" where it is unknown."""
    import torch.distributed as dist

    if "group" not in frame.f_code.co_varnames or not dist.is_initialized():
        return ""
    group = frame.f_locals.get("group")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        return ""
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialized"
    return _ranks_of(group, groups)


def _ranks_of(group: ProcessGroup, groups: ProcessGroupCollection | None) -> str:
    """Return " among ranks …" with the axes of the group."""
    import torch.distributed as dist

    ranks, axes = dist.get_process_group_ranks(group), _axes_of(group, groups)
    shown = ", ".join(map(str, ranks[:16])) + (f", … {len(ranks)} in all" if ranks[16:] else "")
    return f" among ranks {shown}" + (f" ({' and '.join(axes)})" if axes else "")


def _axes_of(group: ProcessGroup, groups: ProcessGroupCollection | None) -> list[str]:
    """Return the parallel axes whose group this is, or else those whose groups have its ranks."""
    import torch.distributed as dist

    axes = {axis: getattr(groups, field, None) for axis, field in AXES.items()}
    # A rank outside an axis has None, or Megatron's placeholder, instead of a group.
    axes = {axis: own for axis, own in axes.items() if isinstance(own, dist.ProcessGroup)}
    ranks = dist.get_process_group_ranks(group)
    same = [axis for axis, own in axes.items() if dist.get_process_group_ranks(own) == ranks]
    return [axis for axis, own in axes.items() if own is group] or same
