"""A model of stream queues that runs: how a push ends whose processes enqueue given operations.

A stream comes to a place of its queue once all before it has ended. The sends and receives that
start there are then *posted*; those that it waits for there must end before it goes on. Transfers
between two processes meet in order, as NCCL's do. One ends once both sides have posted it; with
*buffered* buckets its send ends once all but so many of the pair's sends before it have ended.
Unlike `schedule_check.find_fault`, which compares places, it counts what was posted on either
side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
        operations: the operations of all processes, as `stream_operations.OPERATION`.
        transfer_seconds: how long each operation takes from when both sides have posted it."""

    def __init__(self, operations: np.ndarray, transfer_seconds: np.ndarray | float = 0.0):
        self._seconds = np.broadcast_to(transfer_seconds, len(operations))
        self._is_send = operations["sends"].astype(np.int64)
        self._match_transfers(operations)
        names, stream = np.unique(operations["process"], return_inverse=True)
        lengths = np.zeros(len(names), np.int64)
        np.maximum.at(lengths, stream, operations["end"] + 1)
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths
        self._starting = _ByPlace(self._begins[stream] + operations["start"], lengths.sum())
        self._operations_awaited = _ByPlace(self._begins[stream] + operations["end"], lengths.sum())

    def _match_transfers(self, operations: np.ndarray) -> None:
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
