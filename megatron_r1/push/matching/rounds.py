"""The rounds in which the buckets of a push are sent over NCCL, which all processes know.

In a round every process sends at most one bucket and receives at most one, both in one group of
NCCL calls. All groups of a process are on one stream of the push's own, round after round. First
a scatter: trainer ranks send each region to one engine of a set. Then equal ranks of all engines
relay what they have, in an all-gather: with n engines every bucket goes to the next engine, to the
one after it, and so on, n - 1 rounds for a bucket of each, in which all send and receive.

Why there is no deadlock. A group ends when its transfers have ended, and a transfer runs once
the streams of both its processes have come to its round. Suppose that some group never ends, and
take one of the earliest round in which that happens. All earlier groups of its process end, so
its process comes to it, and it waits for a process that never comes to this round. That process
stands at a group of an earlier round, which never ends: a contradiction. Whatever else a round
waits for comes before it: a bucket that is relayed has arrived in an earlier round, and a buffer
to pack or unpack in is free once an earlier round has ended. Sends that NCCL buffers only end
earlier. The same holds for hosts, which connect two processes when these first meet. It does not
hold for two orders at once: pushes of a process run one after another, everywhere in one order.

NCCL refuses two ranks on one GPU, and two processes on a GPU compute in turns. So a trainer rank is
the process that receives for the engine rank on its GPU, into memory that both have mapped (CUDA
IPC); what it holds itself it copies there.

docs/push.md defines the words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_r1.base.transports import RELAY_BUCKET_BYTES
from megatron_r1.push.matching.planned_links import (
    EngineRankId,
    EngineSetPlan,
    colocated_trainer_ranks,
)

SCATTER_BUCKET_BYTES = 32 << 20
"""Most bytes of a bucket from a trainer rank; one that is relayed has `RELAY_BUCKET_BYTES`."""
NO_BUCKET = -1
"""In a `ROUND_DTYPE`: nothing is sent, or received."""
ROUND_DTYPE = np.dtype(
    [
        (name, np.int32)
        for name in ("round", "destination", "sent_bucket", "source", "received_bucket")
    ]
)
"""A round of one process: it sends bucket `sent_bucket` to process `destination`, and receives
bucket `received_bucket` from process `source`, in one group."""
Receivers = Sequence[Sequence[Sequence[int]]]
"""By set, engine rank and member: the process that receives for that rank of an engine."""


class ProcessLink(NamedTuple):
    """What one process sends to another.

    Attributes:
        sender: a trainer rank, as processes 0, 1, ... are.
        receiver: the process that receives (`receiving_processes`).
        num_bytes: bytes of one push."""

    sender: int
    receiver: int
    num_bytes: int


@dataclass(frozen=True)
class BucketIndex:
    """Which bucket of which payload.

    Attributes:
        payload: the number of a link or, after all links, of what a member of a set relays.
        number: the bucket of the payload, counted from 0.
        count: the buckets of the payload, which are of equal size."""

    payload: int
    number: int
    count: int


class RoundSchedule:
    """The rounds of a push: first the scatter over `links`, then the relay within `relay_groups`.
    Every process computes the same from the plan.

    The scatter is divided into buckets link by link, numbered in that order; the relay group by
    group and member by member, into as many for each member, numbered after those.

    Args:
        links: all links from trainer ranks.
        relay_groups: the processes with one engine rank, in order of engine, that relay to each
            other.
        scatter_bucket_bytes: most bytes of a bucket of a link, default `SCATTER_BUCKET_BYTES`.
        relay_bucket_bytes: most bytes of a bucket of a relay, default `RELAY_BUCKET_BYTES`.

    Attributes:
        link_buckets: the number of buckets of each link.
        senders: the process that sends each bucket of the scatter.
        receivers: the process that receives it.
        scatter_rounds: its round; NO_BUCKET where a process copies it to itself, before all rounds.
        scatter_bytes: the bytes that each process gets in the scatter.
        bucket_senders: the process that sends each bucket, of links and of relays.
        num_bytes: the size of each bucket."""

    def __init__(
        self,
        links: Sequence[ProcessLink],
        relay_groups: Sequence[Sequence[int]] = (),
        scatter_bucket_bytes: int | None = None,
        relay_bucket_bytes: int | None = None,
    ):
        scatter_bucket_bytes = scatter_bucket_bytes or SCATTER_BUCKET_BYTES
        relay_bucket_bytes = relay_bucket_bytes or RELAY_BUCKET_BYTES
        self.links, self.relay_groups = links, relay_groups
        sides = np.array(links, dtype=np.int64).reshape(-1, 3)
        self.link_buckets = counts = -(-sides[:, 2] // scatter_bucket_bytes)
        self.senders, self.receivers = (np.repeat(sides[:, side], counts) for side in (0, 1))
        self.scatter_rounds = _assign_scatter_rounds(sides[:, 0], sides[:, 1], counts)
        self._by_sender = _GroupedIndices(self.senders)
        self._by_receiver = _GroupedIndices(self.receivers)
        self._relay_index = {
            process: (number, member)
            for number, members in enumerate(relay_groups)
            for member, process in enumerate(members)
        }
        num_processes = max([*self._relay_index, *sides[:, 0], *sides[:, 1]], default=-1) + 1
        self.scatter_bytes = scatter_bytes = np.zeros(num_processes, np.int64)
        np.add.at(scatter_bytes, sides[:, 1], sides[:, 2])
        max_bytes = [int(scatter_bytes[list(members)].max()) for members in relay_groups]
        # By relay group: the buckets that each member relays.
        self._num_relay_buckets = [-(-num_bytes // relay_bucket_bytes) for num_bytes in max_bytes]
        payloads = [
            (process, int(scatter_bytes[process]), num_buckets)
            for members, num_buckets in zip(relay_groups, self._num_relay_buckets, strict=True)
            for process in members
        ]
        relay_rows = np.array(payloads, dtype=np.int64).reshape(-1, 3)
        self._first_relay_bucket = np.cumsum(
            [
                counts.sum(),
                *(n * len(m) for n, m in zip(self._num_relay_buckets, relay_groups, strict=True)),
            ]
        ).tolist()
        self.bucket_senders = np.concatenate(
            [self.senders, np.repeat(relay_rows[:, 0], relay_rows[:, 2])]
        )
        bucket_counts = np.concatenate([counts, relay_rows[:, 2]])
        self.num_bytes = _bucket_sizes(
            np.concatenate([sides[:, 2], relay_rows[:, 1]]), bucket_counts
        )
        self._first_bucket = np.concatenate([[0], np.cumsum(bucket_counts)])

    @property
    def num_processes(self) -> int:
        """Trainer and engine processes that take part."""
        return len(self.scatter_bytes)

    @property
    def num_scatter_buckets(self) -> int:
        """The number of buckets of the scatter."""
        return len(self.senders)

    @cached_property
    def num_scatter_rounds(self) -> int:
        """Rounds in which trainer ranks send to engines."""
        return int(self.scatter_rounds.max(initial=NO_BUCKET)) + 1

    @property
    def num_relay_rounds(self) -> int:
        """Rounds in which engines of a set relay what they received."""
        rounds = zip(self.relay_groups, self._num_relay_buckets, strict=True)
        return max(((len(members) - 1) * buckets for members, buckets in rounds), default=0)

    def largest_buckets(self) -> np.ndarray:
        """Return the bytes of the largest bucket of each round."""
        largest_bytes = np.zeros(self.num_scatter_rounds + self.num_relay_rounds, np.int64)
        is_sent = self.scatter_rounds != NO_BUCKET
        sizes = self.num_bytes[: self.num_scatter_buckets]
        np.maximum.at(largest_bytes, self.scatter_rounds[is_sent], sizes[is_sent])
        relay_bytes = largest_bytes[self.num_scatter_rounds :]
        for members, count in zip(self.relay_groups, self._num_relay_buckets, strict=True):
            size = -(-int(self.scatter_bytes[list(members)].max()) // max(count, 1))
            rounds = relay_bytes[: (len(members) - 1) * count]
            np.maximum(rounds, size, out=rounds)
        return largest_bytes

    @property
    def min_scatter_rounds(self) -> int:
        """The least possible `num_scatter_rounds`: the busiest process's buckets in a direction."""
        is_sent = self.scatter_rounds != NO_BUCKET
        sides = (self.senders[is_sent], self.receivers[is_sent])
        return max(int(np.bincount(side, minlength=1).max()) for side in sides)

    def rounds_of(self, process: int) -> np.ndarray:
        """Return the rounds in which a process takes part, in order, each a `ROUND_DTYPE`."""
        sent, received = self._by_sender.indices(process), self._by_receiver.indices(process)
        sent = sent[self.scatter_rounds[sent] != NO_BUCKET]
        received = received[self.scatter_rounds[received] != NO_BUCKET]
        rounds = np.union1d(self.scatter_rounds[sent], self.scatter_rounds[received])
        rows = np.full(len(rounds), NO_BUCKET, ROUND_DTYPE)
        rows["round"] = rounds
        index = np.searchsorted(rounds, self.scatter_rounds[sent])
        rows["destination"][index], rows["sent_bucket"][index] = self.receivers[sent], sent
        index = np.searchsorted(rounds, self.scatter_rounds[received])
        rows["source"][index], rows["received_bucket"][index] = self.senders[received], received
        if process not in self._relay_index:
            return rows
        return np.concatenate([rows, self._relay_rounds(*self._relay_index[process])])

    def bucket_index(self, bucket: int) -> BucketIndex:
        """Return the payload of a bucket, and which of its buckets it is."""
        payload = int(np.searchsorted(self._first_bucket, bucket, "right")) - 1
        first, end = self._first_bucket[payload : payload + 2].tolist()
        return BucketIndex(payload, bucket - first, end - first)

    def _relay_rounds(self, number: int, member: int) -> np.ndarray:
        """Return the rounds in which a member of a relay group relays what it has."""
        members, num_buckets = np.array(self.relay_groups[number]), self._num_relay_buckets[number]
        hops = np.arange(1, len(members))
        target, source = (member + hops) % len(members), (member - hops) % len(members)
        buckets = np.arange(num_buckets)[:, None]
        rows = np.empty((num_buckets, len(hops)), ROUND_DTYPE)
        rows["round"] = self.num_scatter_rounds + buckets * len(hops) + hops - 1
        rows["destination"], rows["source"] = members[target], members[source]
        rows["sent_bucket"] = self._first_relay_bucket[number] + member * num_buckets + buckets
        rows["received_bucket"] = self._first_relay_bucket[number] + source * num_buckets + buckets
        return rows.ravel()


def schedule_rounds(plans: Sequence[EngineSetPlan], receivers: Receivers) -> RoundSchedule:
    """Return the rounds of a push.

    Args:
        plans: the links of each set (`planned_links.plan_sets`).
        receivers: the processes that receive (`receiving_processes`)."""
    links = [
        ProcessLink(link.trainer_rank, members[link.member], link.num_bytes)
        for plan, engine_set_receivers in zip(plans, receivers, strict=True)
        for rank_links, members in zip(plan, engine_set_receivers, strict=True)
        for link in rank_links
    ]
    relay_groups = [
        members
        for engine_set_receivers in receivers
        for members in engine_set_receivers
        if len(members) > 1
    ]
    return RoundSchedule(links, relay_groups)


def planned_schedule(
    plans: Sequence[EngineSetPlan],
    sets: Sequence[range],
    ranks_per_engine: int,
    world_size: int,
    *,
    colocated: bool,
) -> RoundSchedule:
    """Return the rounds of a push to engines that do not run yet.

    Args:
        plans: the plans of `sets`.
        sets: engines of each set, by number.
        ranks_per_engine: the ranks of an engine.
        world_size: the trainer ranks.
        colocated: the engines' ranks are on the trainer ranks' GPUs, in order.
    """
    colocated_ranks = (
        colocated_trainer_ranks(sets, ranks_per_engine, world_size) if colocated else {}
    )
    return schedule_rounds(
        plans, receiving_processes(sets, ranks_per_engine, world_size, colocated_ranks)
    )


def receiving_processes(
    sets: Sequence[range],
    ranks_per_engine: int,
    world_size: int,
    colocated_ranks: Mapping[EngineRankId, int],
) -> Receivers:
    """Return the process that receives for each engine rank: the trainer rank on its GPU, or the
    engine rank itself, numbered after the trainer ranks.

    Args:
        sets: engines of each set, by number.
        ranks_per_engine: the ranks of an engine.
        world_size: trainer ranks.
        colocated_ranks: the trainer rank on the GPU of each engine rank that shares one."""
    return [
        [
            [
                colocated_ranks.get((index, member, rank), world_size + first + rank)
                for member, first in enumerate(engine * ranks_per_engine for engine in engines)
            ]
            for rank in range(ranks_per_engine)
        ]
        for index, engines in enumerate(sets)
    ]


class _GroupedIndices:
    """The indices of equal values."""

    def __init__(self, values: np.ndarray):
        self._order = np.argsort(values, kind="stable")
        self._ends = np.cumsum(np.bincount(values, minlength=1))

    def indices(self, value: int) -> np.ndarray:
        if value >= len(self._ends):
            return self._order[:0]
        return self._order[self._ends[value - 1] if value else 0 : self._ends[value]]


def _bucket_sizes(num_bytes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the bytes of each bucket where `num_bytes` are divided into `counts` buckets."""
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    num_bytes, counts = np.repeat(num_bytes, counts), np.repeat(counts, counts)
    return num_bytes * (numbers + 1) // counts - num_bytes * numbers // counts


def _assign_scatter_rounds(
    sender: np.ndarray, receiver: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return the round of each bucket of the links, or NO_BUCKET where sender and receiver are one.

    Greedy matchings: each round takes the links of the busiest processes first, so that few have
    more left than the others. The shipped recipes need at most 1.04 times the least number."""
    rounds = np.full(counts.sum(), NO_BUCKET, np.int32)
    buckets_left = np.where(sender == receiver, 0, counts)
    size = int(max(sender.max(initial=0), receiver.max(initial=0))) + 1
    send_counts = np.bincount(sender, buckets_left, size).astype(np.int64)
    receive_counts = np.bincount(receiver, buckets_left, size).astype(np.int64)
    next_bucket, number = np.cumsum(counts) - counts, 0
    links_left = np.flatnonzero(buckets_left)
    while len(links_left):
        load = np.maximum(send_counts[sender[links_left]], receive_counts[receiver[links_left]])
        busiest_first = links_left[np.lexsort((links_left, -buckets_left[links_left], -load))]
        matched_links = _greedy_matching(
            busiest_first.tolist(), sender[busiest_first].tolist(), receiver[busiest_first].tolist()
        )
        rounds[next_bucket[matched_links]] = number
        next_bucket[matched_links] += 1
        buckets_left[matched_links] -= 1
        send_counts[sender[matched_links]] -= 1
        receive_counts[receiver[matched_links]] -= 1
        links_left, number = links_left[buckets_left[links_left] > 0], number + 1
    return rounds


def _greedy_matching(links: list[int], senders: list[int], receivers: list[int]) -> np.ndarray:
    """Return links, in order of preference, no two of which share a sender or a receiver."""
    busy_senders, busy_receivers, matched_links = set(), set(), []
    for link, sender, receiver in zip(links, senders, receivers, strict=True):
        if sender not in busy_senders and receiver not in busy_receivers:
            busy_senders.add(sender)
            busy_receivers.add(receiver)
            matched_links.append(link)
    return np.array(matched_links)
