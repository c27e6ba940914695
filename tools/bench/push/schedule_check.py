"""Proves that an order of sends and receives between processes cannot wait in a circle, or finds
the circle.

An order is what each process enqueues on a CUDA stream, which is a queue: groups of sends and
receives that start together once the stream has come to them, and waits of the stream for their
ends. A send and its receive end once both have started; nothing is buffered, as buffers only let
sends end earlier. NCCL has no tags: the first send from one process to another meets the first
receive there, and so on. So what can end is the same however fast processes are, and an order in
which all ends, once, is free of circular waits. `stream_queues` is a second model of the same,
which runs."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np

from megatron_r1.push.matching.rounds import NO_BUCKET, RoundSchedule


class Fault(Enum):
    """Why an order is refused."""

    UNMATCHED = "a process has no counterpart for a send or a receive"
    MISMATCHED = "a process receives another bucket than the one that is sent"
    EARLY = "a process passes on a bucket that has not arrived"
    CYCLE = "processes wait for each other in a circle"


class TransferWait(NamedTuple):
    """A process at a send or receive of a bucket, and the link from `sender` to `receiver`."""

    process: int
    sender: int
    receiver: int
    bucket: int


class ScheduleFault(NamedTuple):
    """What is wrong with an order, and where: the waits of a circle, each for the process of the
    next, or the one process at fault."""

    fault: Fault
    waits: tuple[TransferWait, ...]

    def __str__(self) -> str:
        links = "; ".join(
            f"process {wait.process} at bucket {wait.bucket} of {wait.sender} -> {wait.receiver}"
            for wait in self.waits
        )
        return f"{self.fault.value}: {links}"


def find_fault(operations: np.ndarray, order: RoundSchedule) -> ScheduleFault | None:
    """Return why an order is refused, or None if it is free of circular waits.

    Args:
        operations: the operations of all processes, as `stream_operations.OPERATION`.
        order: has the buckets."""
    if refusal := _find_unmatched(operations):
        return refusal
    sends, receives = _pair_order(operations, sends=True), _pair_order(operations, sends=False)
    return (
        _find_mismatch(operations, sends, receives)
        or _find_early(operations, order)
        or _Queues(operations, sends, receives).find_cycle()
    )


def _find_unmatched(operations: np.ndarray) -> ScheduleFault | None:
    _, pair = np.unique(_pair_numbers(operations), return_inverse=True)
    excess = np.bincount(pair, np.where(operations["sends"], 1, -1)).astype(np.int64)
    if not excess.any():
        return None
    first = np.argmax(excess != 0)
    surplus = np.flatnonzero((pair == first) & (operations["sends"] == (excess[first] > 0)))
    return ScheduleFault(Fault.UNMATCHED, (_make_wait(operations[surplus[-abs(excess[first])]]),))


def _find_mismatch(
    operations: np.ndarray, sends: np.ndarray, receives: np.ndarray
) -> ScheduleFault | None:
    is_mismatch = operations["bucket"][sends] != operations["bucket"][receives]
    if not is_mismatch.any():
        return None
    first = np.argmax(is_mismatch)
    waits = [_make_wait(operations[side[first]]) for side in (receives, sends)]
    return ScheduleFault(Fault.MISMATCHED, tuple(waits))


def _find_early(operations: np.ndarray, order: RoundSchedule) -> ScheduleFault | None:
    """Find a send of a bucket that its process does not have, or has not yet.

    A process passes on what has entered it once all of that has ended, earlier in the same
    stream."""
    process, bucket = operations["process"], operations["bucket"]
    enters = bucket < order.num_scatter_buckets
    entering = np.flatnonzero(~operations["sends"] & enters)
    last = np.full(
        int(process.max(initial=0)) + 1, NO_BUCKET
    )  # the end of each process's last arrival
    np.maximum.at(last, process[entering], operations["end"][entering])
    in_time = last[process] < operations["start"]
    has_it = (order.bucket_senders[bucket] == process) & (enters | in_time)
    early_sends = np.flatnonzero(operations["sends"] & ~has_it)
    return (
        ScheduleFault(Fault.EARLY, (_make_wait(operations[early_sends[0]]),))
        if len(early_sends)
        else None
    )


def _pair_numbers(operations: np.ndarray) -> np.ndarray:
    """Return a number for the (sender, receiver) of each operation."""
    sender = np.where(operations["sends"], operations["process"], operations["peer"])
    receiver = np.where(operations["sends"], operations["peer"], operations["process"])
    return sender.astype(np.int64) << 32 | receiver


def _pair_order(operations: np.ndarray, *, sends: bool) -> np.ndarray:
    """Return the places of all sends, or receives, by pair, in the order of each pair."""
    places = np.flatnonzero(operations["sends"] == sends)
    return places[np.argsort(_pair_numbers(operations[places]), kind="stable")]


def _make_wait(operation: np.ndarray | np.void) -> TransferWait:
    process, peer = int(operation["process"]), int(operation["peer"])
    sender, receiver = (process, peer) if operation["sends"] else (peer, process)
    return TransferWait(process, sender, receiver, int(operation["bucket"]))


class _Queues:
    """The streams of all processes, whose places are numbered through, stream after stream."""

    def __init__(self, operations: np.ndarray, sends: np.ndarray, receives: np.ndarray):
        self.operations = operations
        numbers, self.stream = np.unique(operations["process"], return_inverse=True)
        lengths = np.zeros(len(numbers), np.int64)
        np.maximum.at(lengths, self.stream, operations["end"] + 1)
        self.stream_ends = np.cumsum(lengths)
        self.head = self.stream_ends - lengths
        self.start = self.head[self.stream] + operations["start"]
        end = self.head[self.stream] + operations["end"]
        self.end_order = np.argsort(end, kind="stable")
        self.first_in_order = np.searchsorted(end[self.end_order], np.arange(lengths.sum() + 1))
        self.partner = np.empty(len(operations), np.int64)
        self.partner[sends], self.partner[receives] = receives, sends

    def find_cycle(self) -> ScheduleFault | None:
        """Let all streams go on as far as they can, and return a circle of those that cannot."""
        left = np.flatnonzero(self.head < self.stream_ends)
        while len(left):
            rows, owner = self._operations_awaited(left)
            blocked = np.bincount(owner, ~self._have_started(self.partner[rows]), len(left)) > 0
            if blocked.all():
                return self._cycle_fault(left)
            self.head[left[~blocked]] += 1
            left = left[self.head[left] < self.stream_ends[left]]
        return None

    def _operations_awaited(self, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the operations that the streams wait for where they are, and the place in
        `streams` of each."""
        first = self.first_in_order[self.head[streams]]
        counts = self.first_in_order[self.head[streams] + 1] - first
        owner = np.repeat(np.arange(len(streams)), counts)
        position_in_list = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.end_order[first[owner] + position_in_list], owner

    def _have_started(self, rows: np.ndarray) -> np.ndarray:
        return self.head[self.stream[rows]] >= self.start[rows]

    def _cycle_fault(self, stuck: np.ndarray) -> ScheduleFault:
        rows, owner = self._operations_awaited(stuck)
        blocking = ~self._have_started(self.partner[rows])
        waits = dict(zip(stuck[owner[blocking]].tolist(), rows[blocking].tolist(), strict=True))
        stream, passed = next(iter(waits)), []
        while stream not in passed:
            passed.append(stream)
            stream = int(self.stream[self.partner[waits[stream]]])
        cycle = passed[passed.index(stream) :]
        return ScheduleFault(
            Fault.CYCLE, tuple(_make_wait(self.operations[waits[stream]]) for stream in cycle)
        )
