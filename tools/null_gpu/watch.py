"""What the processes on null GPUs wait for, read from the segment that they share: which of them
wait for each other in a circle, and which for a rank that has ended, named by ranks.
`python watch.py SEGMENT` looks every second, and ends with the first that it sees twice.

A stream waits for a call of NCCL, which waits for the peer's call, which may be queued on a stream
behind another call; a stream waits for an event or the default stream. A circle of these can only
be ended by an abort. Where a peer has not issued its call and a thread of its process is blocked in
a wait of the host, that wait counts as a link too: `through_host` says so, as another thread of
that process may still issue it."""

import ctypes
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("state", "behind", "gpu", "padding")),
        ("blocked_ns", ctypes.c_int64),
    ]


class CallRecord(ctypes.Structure):
    _fields_ = [
        ("comm", ctypes.c_uint64),
        ("number", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("rank", "peer", "is_send", "state", "stream", "gpu")),
    ]


class WaitRecord(ctypes.Structure):
    _fields_ = [
        ("comm", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("kind", "stream", "rank", "thread")),
    ]


class MemberRecord(ctypes.Structure):
    _fields_ = [("comm", ctypes.c_uint64), ("rank", ctypes.c_int32), ("size", ctypes.c_int32)]


class ProcessRecord(ctypes.Structure):
    """`process` in shim/segment.h."""

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


@dataclass
class Cycle:
    """Calls and waits each of which waits for the next, and the last for the first."""

    links: list[Call | Wait] = field(default_factory=list)

    @property
    def through_host(self) -> bool:
        return any(isinstance(link, Wait) for link in self.links)

    def __str__(self) -> str:
        return "these wait for each other in a circle:\n" + "\n".join(f"  {a}" for a in self.links)


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


def _used(calls: ctypes.Array[CallRecord]) -> list[CallRecord]:
    """Return the records of calls that are not ended: few of thousands."""
    numbers = np.frombuffer(memoryview(calls), np.int32).reshape(CALLS, -1)
    states = numbers[:, CallRecord.state.offset // 4]
    return [calls[index] for index in np.flatnonzero(states)]


def parse(record: ProcessRecord) -> Process:
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
        for call in _used(record.calls)
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


def read(segment: Path) -> list[Process]:
    """Return what the processes wait for at one moment: no call has changed while it was read."""
    while True:
        processes = [parse(record) for record in records(segment)]
        changes_by_pid = {record.pid: record.changes for record in records(segment)}
        if {process.pid: process.changes for process in processes} == changes_by_pid:
            return processes


Node = tuple[int, int]
"""A stream's pid and number; a process's host is its pid and -1."""


class Graph:
    """Who waits for whom."""

    def __init__(self, processes: list[Process]) -> None:
        self.started: dict[Node, list[Call]] = {}
        self.by_name: dict[tuple[int, int], list[Call]] = {}
        self.processes = {process.pid: process for process in processes}
        for process in processes:
            for call in process.calls:
                self.by_name.setdefault((call.comm, call.number), []).append(call)
                if call.has_started:
                    self.started.setdefault((call.pid, call.stream), []).append(call)

    def edges(self, node: Node) -> Iterator[tuple[Call | Wait | None, Node]]:
        """Yield whom a stream or a host waits for, and by what; None: by its place in a queue."""
        pid, stream = node
        process = self.processes[pid]
        if stream < 0:
            for wait in process.waits:
                if wait.stream >= 0:
                    yield wait, (pid, wait.stream)
        elif stream in process.behind:
            yield None, (pid, process.behind[stream])
        for call in self.started.get(node, []):
            answers = [c for c in self.by_name[call.comm, call.number] if c.answers(call)]
            for answer in answers:
                if not answer.has_started:
                    yield call, (answer.pid, answer.stream)
            came = {answer.rank for answer in answers} | {call.rank}
            for other in self.processes.values():
                for comm, rank in other.members:
                    is_wanted = rank == call.peer if call.peer is not None else rank not in came
                    if comm == call.comm and is_wanted and rank not in came:
                        yield call, (other.pid, -1)

    def cycle(self) -> Cycle | None:
        """Return one, without a host where there is such a one."""
        for with_hosts in (False, True):
            finished_nodes: set[Node] = set()
            for node in self.started:
                if cycle := self._from(node, [], {}, finished_nodes, with_hosts=with_hosts):
                    return cycle
        return None

    def _from(self, node, labels, places, finished_nodes, *, with_hosts: bool) -> Cycle | None:
        if node in places:
            links = [label for label in labels[places[node] :] if label is not None]
            # Streams alone cannot wait in a circle; what they wait for is read one after another.
            return Cycle(links) if links else None
        if node in finished_nodes:
            return None
        places[node] = len(labels)
        for label, neighbour in self.edges(node):
            if neighbour[1] >= 0 or with_hosts:
                cycle = self._from(
                    neighbour, [*labels, label], places, finished_nodes, with_hosts=with_hosts
                )
                if cycle:
                    return cycle
        del places[node]
        finished_nodes.add(node)
        return None


def find_cycle(segment: Path) -> Cycle | None:
    """Return calls that wait for each other, if there are any now."""
    return Graph(read(segment)).cycle()


def abandoned_calls(processes: list[Process]) -> list[Call]:
    """Return calls that wait for a rank that has ended or left the communicator."""
    members = {member for process in processes for member in process.members}
    calls = [call for process in processes for call in process.calls if call.has_started]
    sizes = {comm: size for process in processes for comm, size in process.sizes.items()}
    return [
        call
        for call in calls
        for peer in ([call.peer] if call.peer is not None else range(sizes.get(call.comm, 0)))
        if (call.comm, peer) not in members
    ]


def find_stuck(segment: Path) -> str | None:
    """Return a text that names calls that wait for each other, or for ranks that have ended."""
    processes = read(segment)
    if cycle := Graph(processes).cycle():
        return str(cycle)
    abandoned = abandoned_calls(processes)
    lines = ["these wait for ranks that have ended:", *(f"  {call}" for call in abandoned)]
    return "\n".join(lines) if abandoned else None


def held_bytes(segment: Path) -> dict[int, list[int]]:
    """Return the bytes of each GPU that each running process holds: by pid."""
    return {record.pid: list(record.bytes) for record in records(segment)}


def main(segment: Path) -> None:
    before = None
    while True:
        stuck = find_stuck(segment)
        if stuck and stuck == before:
            sys.exit(stuck)
        before = stuck
        time.sleep(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
