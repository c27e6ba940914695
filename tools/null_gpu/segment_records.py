"""Records of the segment that processes on null GPUs share: what each holds, and which calls of
NCCL and waits of the host have not ended. `shim/segment.h` declares the same."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GPUS = 16
STREAMS = 256
CALLS = 4096
WAITS = 64
MEMBERS = 512
BEHIND_STREAM, IN_CALL = 2, 3
STARTED = 2
KINDS = ["none", "stream", "device", "event", "copy", "free", "operator", "creation"]


class StreamRecord(ctypes.Structure):
    """The state of a stream, and the stream that it waits for."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("state", "behind", "gpu", "padding")),
        ("blocked_ns", ctypes.c_int64),
    ]


class CallRecord(ctypes.Structure):
    """A call of NCCL; `Call` explains the fields."""

    _fields_ = [
        ("comm", ctypes.c_uint64),
        ("number", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("rank", "peer", "is_send", "state", "stream", "gpu")),
    ]


class WaitRecord(ctypes.Structure):
    """What a thread of the host waits for; `Wait` explains the fields."""

    _fields_ = [
        ("comm", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("kind", "stream", "rank", "thread")),
    ]


class MemberRecord(ctypes.Structure):
    """The rank of a process in a communicator, and how many ranks that has."""

    _fields_ = [("comm", ctypes.c_uint64), ("rank", ctypes.c_int32), ("size", ctypes.c_int32)]


class ProcessRecord(ctypes.Structure):
    """All records of one process: `process` in shim/segment.h."""

    _fields_ = [
        ("pid", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("birth", ctypes.c_int64),
        ("bytes", ctypes.c_int64 * GPUS),
        ("peak", ctypes.c_int64 * GPUS),
        ("pinned", ctypes.c_int64),
        ("pinned_peak", ctypes.c_int64),
        ("changes", ctypes.c_int64),
        ("streams", StreamRecord * STREAMS),
        ("calls", CallRecord * CALLS),
        ("waits", WaitRecord * WAITS),
        ("members", MemberRecord * MEMBERS),
    ]


@dataclass(frozen=True)
class Call:
    """A call of NCCL that has not ended.

    Attributes:
        pid: the process.
        gpu: its GPU.
        comm: the identity of the communicator.
        rank: the rank of the process in it.
        peer: the rank of the other side, None for a collective.
        is_send: whether it sends to the peer.
        number: counts the calls, see `answers`.
        stream: the CUDA stream.
        has_started: whether the GPU has begun it."""

    pid: int
    gpu: int
    comm: int
    rank: int
    peer: int | None
    is_send: bool
    number: int
    stream: int
    has_started: bool

    def __str__(self) -> str:
        call = f"{'send' if self.is_send else 'receive'} {self.number}"
        if self.peer is None:
            call = f"collective {self.number}"
        elif self.is_send:
            call += f" to rank {self.peer}"
        else:
            call += f" from rank {self.peer}"
        return f"rank {self.rank} of {self.comm:016x} (GPU {self.gpu}, pid {self.pid}): {call}"

    def answers(self, other: "Call") -> bool:
        """Whether this is what the other waits for."""
        if (self.comm, self.number) != (other.comm, other.number) or self.rank == other.rank:
            return False
        if self.peer is None or other.peer is None:
            return self.peer is other.peer
        ranks = (self.rank, self.peer) == (other.peer, other.rank)
        return ranks and self.is_send != other.is_send


@dataclass(frozen=True)
class Wait:
    """A wait of a thread of the host, for a stream or, `creation`, for a communicator's ranks."""

    pid: int
    thread: int
    kind: str
    stream: int
    comm: int

    def __str__(self) -> str:
        subject = f"of {self.comm:016x}" if self.kind == "creation" else f"stream {self.stream}"
        return f"host of pid {self.pid}, thread {self.thread}: waits ({self.kind}, {subject})"


@dataclass
class Process:
    """What a process has not ended, and the communicators that it is in."""

    pid: int
    changes: int
    behind: dict[int, int]
    """Of each stream that waits for another: that one."""
    calls: list[Call]
    waits: list[Wait]
    members: set[tuple[int, int]]
    """Communicators and the ranks in them."""
    sizes: dict[int, int]
    """Of the communicators."""


def read(segment: Path) -> list[Process]:
    """Return what the processes wait for at one moment: no call has changed while it was read."""
    while True:
        processes = [parse(record) for record in records(segment)]
        changes_by_pid = {record.pid: record.changes for record in records(segment)}
        if {process.pid: process.changes for process in processes} == changes_by_pid:
            return processes


def held_bytes(segment: Path) -> dict[int, list[int]]:
    """Return the bytes of each GPU that each running process holds: by pid."""
    return {record.pid: list(record.bytes) for record in records(segment)}


def records(segment: Path) -> Iterator[ProcessRecord]:
    """Yield the records of processes that live."""
    size = ctypes.sizeof(ProcessRecord)
    if not segment.exists():  # nothing has used a GPU yet
        return
    with segment.open("rb") as file:
        while len(raw_record := file.read(size)) == size:
            record = ProcessRecord.from_buffer_copy(raw_record)
            if not record.pid:
                return  # slots are taken from the first on
            if born(record.pid) == record.birth:
                yield record


def born(pid: int) -> int:
    """Return when a process started, in ticks; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _unended_calls(calls: ctypes.Array[CallRecord]) -> list[CallRecord]:
    """Return the records of calls that are not ended: few of thousands."""
    numbers = np.frombuffer(memoryview(calls), np.int32).reshape(CALLS, -1)
    states = numbers[:, CallRecord.state.offset // 4]
    return [calls[index] for index in np.flatnonzero(states)]


def parse(record: ProcessRecord) -> Process:
    """Return what a process has not ended, without the empty records."""
    calls = [
        Call(
            record.pid,
            call.gpu,
            call.comm,
            call.rank,
            None if call.peer < 0 else call.peer,
            bool(call.is_send),
            call.number,
            call.stream,
            call.state == STARTED,
        )
        for call in _unended_calls(record.calls)
    ]
    waits = [
        Wait(record.pid, wait.thread, KINDS[wait.kind], wait.stream, wait.comm)
        for wait in record.waits
        if wait.kind
    ]
    behind = {
        number: stream.behind
        for number, stream in enumerate(record.streams)
        if stream.state == BEHIND_STREAM and stream.behind >= 0
    }
    members = {(member.comm, member.rank) for member in record.members if member.size > 0}
    sizes = {member.comm: member.size for member in record.members if member.size > 0}
    return Process(record.pid, record.changes, behind, calls, waits, members, sizes)
