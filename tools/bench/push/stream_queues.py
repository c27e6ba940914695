"""A model of processes that send to each other from CUDA streams, which are queues.

A stream comes to a place of its queue once all before it has ended. The sends and receives that
start there are then *posted*; those that it waits for there must end before it goes on. Transfers
between two processes meet in order, as NCCL's do. One ends once both sides have posted it; with
*buffered* buckets its send ends once all but so many of the pair's sends before it have ended.

Unlike `order_check`, which compares places, this counts what was posted on either side."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from megatron_r1.push.plan.rounds import RoundSchedule
from tools.bench.push.order_check import Call, Step


class Ended(NamedTuple):
    """How a push ends.

    Attributes:
        num_stuck: processes that do not come to the end of their streams.
        seconds: until the last comes there, without buffers."""

    num_stuck: int
    seconds: float


class StreamQueues:
    """The streams of all processes, each a queue of operations.

    Args:
        operations: the operations of all processes, as `order_check.OPERATION`.
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
        self._awaited = _ByPlace(self._begins[stream] + operations["end"], lengths.sum())

    def _match(self, operations: np.ndarray) -> None:
        """Number the transfers of each pair (sender, receiver) on both sides, and through."""
        process, peer = operations["process"].astype(np.int64), operations["peer"]
        pairs = np.where(operations["sends"], process << 32 | peer, peer.astype(np.int64) << 32)
        pairs += np.where(operations["sends"], 0, process)
        _, self._pair = np.unique(pairs, return_inverse=True)
        self._number = np.empty(len(operations), np.int64)
        most = np.zeros(self._pair.max(initial=-1) + 1, np.int64)
        for side in (0, 1):
            rows = np.flatnonzero(self._is_send == side)
            rows = rows[np.argsort(self._pair[rows], kind="stable")]
            of_row = self._pair[rows]
            self._number[rows] = np.arange(len(rows)) - np.searchsorted(of_row, of_row)
            np.maximum.at(most, of_row, self._number[rows] + 1)
        self._transfer = (np.cumsum(most) - most)[self._pair] + self._number
        self._num_transfers = int(most.sum())

    def run(self, seed: int = 0, buffered: int = 0) -> Ended:
        """Let the streams go on, a random part of them in each turn, until none can."""
        rng = np.random.default_rng(seed)
        head, now = self._begins.copy(), np.zeros(len(self._begins))
        posted = np.zeros((2, self._pair.max(initial=-1) + 1), np.int64)
        posted_at = np.zeros((2, self._num_transfers))
        left = moved = np.arange(len(head))
        while len(left):
            rows, owner = self._starting.rows(head[moved])
            np.add.at(posted, (self._is_send[rows], self._pair[rows]), 1)
            posted_at[self._is_send[rows], self._transfer[rows]] = now[moved[owner]]
            for turn in (left[rng.random(len(left)) < 0.75], left):
                rows, owner = self._awaited.rows(head[turn])
                met = posted[:, self._pair[rows]].min(axis=0) + buffered * self._is_send[rows]
                goes_on = np.bincount(owner, self._number[rows] >= met, len(turn)) == 0
                if goes_on.any():
                    break
            else:
                break
            ending = rows[goes_on[owner]]
            ends = posted_at[:, self._transfer[ending]].max(axis=0) + self._seconds[ending]
            np.maximum.at(now, turn[owner[goes_on[owner]]], ends)
            moved = turn[goes_on]
            head[moved] += 1
            moved, left = (some[head[some] < self._ends[some]] for some in (moved, left))
        return Ended(len(left), float(now.max(initial=0.0)))


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
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._order[first[owner] + within], owner


def link_threads(order: RoundSchedule, seed: int, interleaved: int = 0) -> dict[int, list[Step]]:
    """Return the steps of what enters without a common order: a thread for each link of a process,
    which all enqueue on its one stream. A sender packs a bucket while the one before travels, a
    receiver unpacks it.

    Args:
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
    for process, running in threads.items():
        rng.shuffle(running)
        steps = enqueued[process] = []
        while running:
            thread = running[rng.randrange(len(running)) if interleaved else 0]
            count = interleaved or len(thread)
            steps += thread[:count]
            del thread[:count]
            running[:] = [thread for thread in running if thread]
    return enqueued
