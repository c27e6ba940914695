"""Proves that an order of sends and receives between processes cannot wait in a circle, or finds
the circle.

An order is what each process enqueues on a CUDA stream, which is a queue: groups of sends and
receives that start together once the stream has come to them, and waits of the stream for their
ends. A send and its receive end once both have started; nothing is buffered, as buffers only let
sends end earlier. NCCL has no tags: the first send from one process to another meets the first
receive there, and so on. So what can end is the same however fast processes are, and an order in
which all ends, once, is free of circular waits.

`StreamQueues` is a second model of the same, which runs: a stream comes to a place of its queue
once all before it has ended. The sends and receives that start there are then *posted*; those that
it waits for there must end before it goes on. Transfers between two processes meet in order, as
NCCL's do. One ends once both sides have posted it; with *buffered* buckets its send ends once all
but so many of the pair's sends before it have ended. Unlike `find_fault`, which compares places, it
counts what was posted on either side."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from megatron_r1.push.plan.rounds import NO_BUCKET, RoundSchedule

OPERATION = np.dtype(
    [(name, np.int32) for name in ("process", "start", "end", "peer", "bucket")]
    + [("sends", np.bool_)]
)
"""A send to or a receive from process `peer`. `start`: its place in the stream of its process,
`end`: the place at which the stream waits for it; equal, if the stream waits at once. A process's
operations stand in the order in which its host enqueues them."""


class Call(NamedTuple):
    """A send of a bucket to a process, or its receive from a process."""

    sends: bool
    peer: int
    bucket: int


class Step(NamedTuple):
    """Calls that start together once the stream has come to them, and calls whose end the stream
    then waits for: those, or earlier ones."""

    starts: Sequence[Call] = ()
    waits: Sequence[Call] = ()


class Fault(Enum):
    """Why an order is refused."""

    UNMATCHED = "a process has no counterpart for a send or a receive"
    MISMATCHED = "a process receives another bucket than the one that is sent"
    EARLY = "a process passes on a bucket that has not arrived"
    CYCLE = "processes wait for each other in a circle"


class Wait(NamedTuple):
    """A process at a send or receive of a bucket, and the link from `sender` to `receiver`."""

    process: int
    sender: int
    receiver: int
    bucket: int


class Refusal(NamedTuple):
    """What is wrong with an order, and where: the waits of a circle, each for the process of the
    next, or the one process at fault."""

    fault: Fault
    waits: tuple[Wait, ...]

    def __str__(self) -> str:
        links = "; ".join(
            f"process {wait.process} at bucket {wait.bucket} of {wait.sender} -> {wait.receiver}"
            for wait in self.waits
        )
        return f"{self.fault.value}: {links}"


def operations_of_rounds(order: RoundSchedule) -> np.ndarray:
    """Return the operations of all processes, each of which runs its schedule."""
    operations = []
    for process in range(order.num_processes):
        schedule = order.rounds_of(process)
        rows = np.zeros((len(schedule), 2), OPERATION)
        rows["process"], rows["start"] = process, np.arange(len(schedule))[:, None]
        rows["end"], rows["sends"] = rows["start"], (True, False)
        rows["peer"] = np.stack([schedule["to"], schedule["source"]], axis=1)
        rows["bucket"] = np.stack([schedule["sent"], schedule["received"]], axis=1)
        operations.append(rows[rows["bucket"] != NO_BUCKET])
    return np.concatenate(operations)


def operations_of_steps(steps: Mapping[int, Sequence[Step]]) -> np.ndarray:
    """Return the operations of processes whose hosts enqueue these steps."""
    rows = []
    for process, enqueued in steps.items():
        row_of_call: dict[Call, list[Any]] = {}
        for place, step in enumerate(enqueued):
            for call in step.starts:
                row = [process, place, place, call.peer, call.bucket, call.sends]
                row_of_call[call] = row
                rows.append(row)
            for call in step.waits:
                row_of_call[call][2] = place
    return np.array([tuple(row) for row in rows], OPERATION)


def find_fault(operations: np.ndarray, order: RoundSchedule) -> Refusal | None:
    """Return why an order is refused, or None if it is free of circular waits.

    Args:
        operations: the operations of all processes, as `OPERATION`.
        order: has the buckets."""
    if refusal := _find_unmatched(operations):
        return refusal
    sends, receives = _pair_order(operations, sends=True), _pair_order(operations, sends=False)
    return (
        _find_mismatch(operations, sends, receives)
        or _find_early(operations, order)
        or _Queues(operations, sends, receives).find_cycle()
    )


def _pairs(operations: np.ndarray) -> np.ndarray:
    """Return a number for the (sender, receiver) of each operation."""
    sender = np.where(operations["sends"], operations["process"], operations["peer"])
    receiver = np.where(operations["sends"], operations["peer"], operations["process"])
    return sender.astype(np.int64) << 32 | receiver


def _pair_order(operations: np.ndarray, *, sends: bool) -> np.ndarray:
    """Return the places of all sends, or receives, by pair, in the order of each pair."""
    places = np.flatnonzero(operations["sends"] == sends)
    return places[np.argsort(_pairs(operations[places]), kind="stable")]


def _wait(operation: np.ndarray | np.void) -> Wait:
    process, peer = int(operation["process"]), int(operation["peer"])
    sender, receiver = (process, peer) if operation["sends"] else (peer, process)
    return Wait(process, sender, receiver, int(operation["bucket"]))


def _find_unmatched(operations: np.ndarray) -> Refusal | None:
    _, pair = np.unique(_pairs(operations), return_inverse=True)
    excess = np.bincount(pair, np.where(operations["sends"], 1, -1)).astype(np.int64)
    if not excess.any():
        return None
    first = np.argmax(excess != 0)
    surplus = np.flatnonzero((pair == first) & (operations["sends"] == (excess[first] > 0)))
    return Refusal(Fault.UNMATCHED, (_wait(operations[surplus[-abs(excess[first])]]),))


def _find_mismatch(
    operations: np.ndarray, sends: np.ndarray, receives: np.ndarray
) -> Refusal | None:
    is_mismatch = operations["bucket"][sends] != operations["bucket"][receives]
    if not is_mismatch.any():
        return None
    first = np.argmax(is_mismatch)
    waits = [_wait(operations[side[first]]) for side in (receives, sends)]
    return Refusal(Fault.MISMATCHED, tuple(waits))


def _find_early(operations: np.ndarray, order: RoundSchedule) -> Refusal | None:
    """Find a send of a bucket that its process does not have, or has not yet: it passes on what has
    entered it once all of that has ended, earlier in the same stream."""
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
    return Refusal(Fault.EARLY, (_wait(operations[early_sends[0]]),)) if len(early_sends) else None


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

    def find_cycle(self) -> Refusal | None:
        """Let all streams go on as far as they can, and return a circle of those that cannot."""
        left = np.flatnonzero(self.head < self.stream_ends)
        while len(left):
            rows, owner = self._operations_awaited(left)
            blocked = np.bincount(owner, ~self._have_started(self.partner[rows]), len(left)) > 0
            if blocked.all():
                return self._cycle(left)
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

    def _cycle(self, stuck: np.ndarray) -> Refusal:
        rows, owner = self._operations_awaited(stuck)
        blocking = ~self._have_started(self.partner[rows])
        waits = dict(zip(stuck[owner[blocking]].tolist(), rows[blocking].tolist(), strict=True))
        stream, passed = next(iter(waits)), []
        while stream not in passed:
            passed.append(stream)
            stream = int(self.stream[self.partner[waits[stream]]])
        cycle = passed[passed.index(stream) :]
        return Refusal(
            Fault.CYCLE, tuple(_wait(self.operations[waits[stream]]) for stream in cycle)
        )


class PushOutcome(NamedTuple):
    """How a push ends.

    Attributes:
        num_stuck: processes that do not come to the end of their streams.
        seconds: until the last comes there, without buffers."""

    num_stuck: int
    seconds: float


class StreamQueues:
    """The streams of all processes, each a queue of operations.

    Args:
        operations: the operations of all processes, as `schedule_check.OPERATION`.
        transfer_seconds: how long each operation takes from when both sides have posted it."""

    def __init__(self, operations: np.ndarray, transfer_seconds: np.ndarray | float = 0.0):
        self._seconds = np.broadcast_to(transfer_seconds, len(operations))
        self._is_send = operations["sends"].astype(np.int64)
        self._match(operations)
        names, stream = np.unique(operations["process"], return_inverse=True)
        lengths = np.zeros(len(names), np.int64)
        np.maximum.at(lengths, stream, operations["end"] + 1)
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths
        self._starting = _ByPlace(self._begins[stream] + operations["start"], lengths.sum())
        self._operations_awaited = _ByPlace(self._begins[stream] + operations["end"], lengths.sum())

    def _match(self, operations: np.ndarray) -> None:
        """Number the transfers of each pair (sender, receiver) on both sides, and through."""
        process, peer = operations["process"].astype(np.int64), operations["peer"]
        pairs = np.where(operations["sends"], process << 32 | peer, peer.astype(np.int64) << 32)
        pairs += np.where(operations["sends"], 0, process)
        _, self._pair = np.unique(pairs, return_inverse=True)
        self._number = np.empty(len(operations), np.int64)
        pair_counts = np.zeros(self._pair.max(initial=-1) + 1, np.int64)
        for side in (0, 1):
            rows = np.flatnonzero(self._is_send == side)
            rows = rows[np.argsort(self._pair[rows], kind="stable")]
            pairs_of_rows = self._pair[rows]
            self._number[rows] = np.arange(len(rows)) - np.searchsorted(
                pairs_of_rows, pairs_of_rows
            )
            np.maximum.at(pair_counts, pairs_of_rows, self._number[rows] + 1)
        self._transfer = (np.cumsum(pair_counts) - pair_counts)[self._pair] + self._number
        self._num_transfers = int(pair_counts.sum())

    def run(self, seed: int = 0, buffered: int = 0) -> PushOutcome:
        """Let the streams go on, a random part of them in each turn, until none can."""
        rng = np.random.default_rng(seed)
        head, clocks = self._begins.copy(), np.zeros(len(self._begins))
        posted = np.zeros((2, self._pair.max(initial=-1) + 1), np.int64)
        posted_at = np.zeros((2, self._num_transfers))
        left = movers = np.arange(len(head))
        while len(left):
            rows, owner = self._starting.rows(head[movers])
            np.add.at(posted, (self._is_send[rows], self._pair[rows]), 1)
            posted_at[self._is_send[rows], self._transfer[rows]] = clocks[movers[owner]]
            for turn in (left[rng.random(len(left)) < 0.75], left):
                rows, owner = self._operations_awaited.rows(head[turn])
                met = posted[:, self._pair[rows]].min(axis=0) + buffered * self._is_send[rows]
                goes_on = np.bincount(owner, self._number[rows] >= met, len(turn)) == 0
                if goes_on.any():
                    break
            else:
                break
            ending = rows[goes_on[owner]]
            ends = posted_at[:, self._transfer[ending]].max(axis=0) + self._seconds[ending]
            np.maximum.at(clocks, turn[owner[goes_on[owner]]], ends)
            movers = turn[goes_on]
            head[movers] += 1
            movers, left = (heads[head[heads] < self._ends[heads]] for heads in (movers, left))
        return PushOutcome(len(left), float(clocks.max(initial=0.0)))


class _ByPlace:
    """The operations at each place of the streams, which are numbered through."""

    def __init__(self, places: np.ndarray, num_places: int):
        self._order = np.argsort(places, kind="stable")
        self._first = np.searchsorted(places[self._order], np.arange(num_places + 1))

    def rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the operations at `places`, and the index in `places` of each."""
        first = self._first[places]
        counts = self._first[places + 1] - first
        owner = np.repeat(np.arange(len(places)), counts)
        position_in_list = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._order[first[owner] + position_in_list], owner


def link_threads(order: RoundSchedule, seed: int, interleaved: int = 0) -> dict[int, list[Step]]:
    """Return the steps of what enters without a common order: a thread for each link of a process,
    which all enqueue on its one stream. A sender packs a bucket while the one before travels, a
    receiver unpacks it.

    Args:
        order: the rounds of a push; its links run.
        seed: chooses the order of the threads.
        interleaved: the steps after which another thread may be next, default a whole link."""
    rng = random.Random(seed)
    threads: defaultdict[int, list[list[Step]]] = defaultdict(list)
    first = 0
    for (sender, receiver, _), count in zip(order.links, order.link_buckets.tolist(), strict=True):
        for process, peer, sends in ((sender, receiver, True), (receiver, sender, False)):
            calls = [Call(sends, peer, first + number) for number in range(count)]
            starts = [Step(starts=[call]) for call in calls]
            waits = [Step(waits=[call]) for call in calls]
            steps = starts[:1]
            for start, wait in zip(starts[1:], waits[:-1], strict=True):
                steps += [wait, start] if sends else [start, wait]
            threads[process].append([*steps, waits[-1]])
        first += count
    enqueued: dict[int, list[Step]] = {}
    for process, threads_left in threads.items():
        rng.shuffle(threads_left)
        steps = enqueued[process] = []
        while threads_left:
            thread = threads_left[rng.randrange(len(threads_left)) if interleaved else 0]
            count = interleaved or len(thread)
            steps += thread[:count]
            del thread[:count]
            threads_left[:] = [thread for thread in threads_left if thread]
    return enqueued
