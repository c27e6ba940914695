"""Sends and receives that each process enqueues on its stream: those of a schedule's rounds, of
steps of its host, or of a thread for each link."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_r1.push.matching.rounds import NO_BUCKET, RoundSchedule

OPERATION = np.dtype(
    [(name, np.int32) for name in ("process", "start", "end", "peer", "bucket")]
    + [("sends", np.bool_)]
)
"""A send to or a receive from process `peer`. `start`: its place in the stream of its process,
`end`: the place at which the stream waits for it; equal, if the stream waits at once. A process's
operations stand in the order in which its host enqueues them."""


class BucketTransfer(NamedTuple):
    """A send of a bucket to a process, or its receive from a process."""

    sends: bool
    peer: int
    bucket: int


class Step(NamedTuple):
    """Calls that start together once the stream has come to them, and calls whose end the stream
    then waits for: those, or earlier ones."""

    starts: Sequence[BucketTransfer] = ()
    waits: Sequence[BucketTransfer] = ()


def operations_of_rounds(order: RoundSchedule) -> np.ndarray:
    """Return the operations of all processes when each runs its own schedule."""
    operations = []
    for process in range(order.num_processes):
        schedule = order.rounds_of(process)
        rows = np.zeros((len(schedule), 2), OPERATION)
        rows["process"], rows["start"] = process, np.arange(len(schedule))[:, None]
        rows["end"], rows["sends"] = rows["start"], (True, False)
        rows["peer"] = np.stack([schedule["destination"], schedule["source"]], axis=1)
        rows["bucket"] = np.stack([schedule["sent_bucket"], schedule["received_bucket"]], axis=1)
        operations.append(rows[rows["bucket"] != NO_BUCKET])
    return np.concatenate(operations)


def operations_of_steps(steps: Mapping[int, Sequence[Step]]) -> np.ndarray:
    """Return the operations of processes whose hosts enqueue these steps."""
    rows = []
    for process, enqueued in steps.items():
        row_of_call: dict[BucketTransfer, list[Any]] = {}
        for place, step in enumerate(enqueued):
            for call in step.starts:
                row = [process, place, place, call.peer, call.bucket, call.sends]
                row_of_call[call] = row
                rows.append(row)
            for call in step.waits:
                row_of_call[call][2] = place
    return np.array([tuple(row) for row in rows], OPERATION)


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
            calls = [BucketTransfer(sends, peer, first + number) for number in range(count)]
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
