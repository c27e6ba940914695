"""The order in which the buckets of a push travel over NCCL: rounds that all processes know.

In a round every process sends at most one bucket and receives at most one, both in one group of
NCCL calls. All groups of a process are on one stream of the push's own, round after round. First
what trainer ranks send enters the engines of each set; then the processes at one position of a
set's engines relay what has entered each: with n engines every bucket travels to the next engine,
to the one after it, and so on, n - 1 rounds for a bucket of each, in which all send and receive.

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

from megatron_r1.push.plan.engine_sets import EngineRank, Plan, ranks_in_order
from megatron_r1.push.transports import RELAYED_BYTES

ENTRY_BYTES = 32 << 20
"""Most bytes of a bucket that enters an engine; one that is relayed has `RELAYED_BYTES`."""
NONE = -1
"""In a row of a schedule: nothing is sent, or received."""
SCHEDULE_ROW = np.dtype(
    [(name, np.int32) for name in ("round", "to", "sent", "source", "received")]
)
"""A round of a process's schedule: it sends bucket `sent` to process `to`, and receives bucket
`received` from process `source`, in one group."""
Receivers = Sequence[Sequence[Sequence[int]]]
"""By set, position and engine: the process that receives for an engine rank."""


class Link(NamedTuple):
    """What one process sends to another. Trainer ranks are processes 0, 1, ...; for engine ranks
    see `receiving_processes`."""

    sender: int
    receiver: int
    num_bytes: int


@dataclass(frozen=True)
class BucketPlace:
    """The place of a bucket in its payload.

    Attributes:
        payload: the payload: a link's or, with numbers after the links', what a member of a set
            relays.
        number: the bucket of the payload, counted from 0.
        count: the buckets of the payload, which are of equal size."""

    payload: int
    number: int
    count: int


class PushOrder:
    """The rounds of a push: first over `links`, then within `positions`, the processes at one
    position of a set's engines, in order of engine. Every process computes the same from the plan.

    What enters is divided into buckets link by link, numbered in that order; what is relayed
    position by position and member by member, into as many for each member, numbered after those.

    Attributes:
        link_buckets: the number of buckets of each link.
        senders: the process that sends each bucket that enters.
        receivers: the process that receives it.
        entry_rounds: its round; NONE where a process copies it to itself, before all rounds.
        entered: the bytes that enter each process.
        origins: the process that sends each bucket, of links and of relays.
        num_bytes: the size of each bucket."""

    def __init__(
        self,
        links: Sequence[Link],
        positions: Sequence[Sequence[int]] = (),
        entry_bytes: int | None = None,
        relayed_bytes: int | None = None,
    ):
        entry_bytes, relayed_bytes = entry_bytes or ENTRY_BYTES, relayed_bytes or RELAYED_BYTES
        self.links, self.positions = links, positions
        sides = np.array(links, dtype=np.int64).reshape(-1, 3)
        self.link_buckets = counts = -(-sides[:, 2] // entry_bytes)
        self.senders, self.receivers = (np.repeat(sides[:, side], counts) for side in (0, 1))
        self.entry_rounds = _entry_rounds(sides[:, 0], sides[:, 1], counts)
        self._by_sender, self._by_receiver = _Grouped(self.senders), _Grouped(self.receivers)
        self._place = {
            process: (number, member)
            for number, members in enumerate(positions)
            for member, process in enumerate(members)
        }
        num_processes = max([*self._place, *sides[:, 0], *sides[:, 1]], default=-1) + 1
        self.entered = entered = np.zeros(num_processes, np.int64)
        np.add.at(entered, sides[:, 1], sides[:, 2])
        most = [int(entered[list(members)].max()) for members in positions]
        # By position: the buckets that each member relays.
        self._relayed = [-(-num_bytes // relayed_bytes) for num_bytes in most]
        payloads = [
            (process, int(entered[process]), num_buckets)
            for members, num_buckets in zip(positions, self._relayed, strict=True)
            for process in members
        ]
        relayed = np.array(payloads, dtype=np.int64).reshape(-1, 3)
        self._first_relayed = np.cumsum(
            [counts.sum(), *(n * len(m) for n, m in zip(self._relayed, positions, strict=True))]
        ).tolist()
        self.origins = np.concatenate([self.senders, np.repeat(relayed[:, 0], relayed[:, 2])])
        bucket_counts = np.concatenate([counts, relayed[:, 2]])
        self.num_bytes = _divided(np.concatenate([sides[:, 2], relayed[:, 1]]), bucket_counts)
        self._first_bucket = np.concatenate([[0], np.cumsum(bucket_counts)])

    @property
    def num_processes(self) -> int:
        """Trainer and engine processes that take part."""
        return len(self.entered)

    @property
    def num_entering(self) -> int:
        """The number of buckets that enter engines."""
        return len(self.senders)

    @cached_property
    def num_entry_rounds(self) -> int:
        """Rounds in which trainer ranks send to engines."""
        return int(self.entry_rounds.max(initial=NONE)) + 1

    @property
    def num_relay_rounds(self) -> int:
        """Rounds in which engines of a set pass on what they received."""
        rounds = zip(self.positions, self._relayed, strict=True)
        return max(((len(members) - 1) * buckets for members, buckets in rounds), default=0)

    def largest_buckets(self) -> np.ndarray:
        """Return the bytes of the largest bucket of each round."""
        found = np.zeros(self.num_entry_rounds + self.num_relay_rounds, np.int64)
        travels = self.entry_rounds != NONE
        entering = self.num_bytes[: self.num_entering]
        np.maximum.at(found, self.entry_rounds[travels], entering[travels])
        relayed = found[self.num_entry_rounds :]
        for members, count in zip(self.positions, self._relayed, strict=True):
            size = -(-int(self.entered[list(members)].max()) // max(count, 1))
            rounds = relayed[: (len(members) - 1) * count]
            np.maximum(rounds, size, out=rounds)
        return found

    @property
    def entry_floor(self) -> int:
        """The least possible `num_entry_rounds`: the busiest process's buckets in a direction."""
        travels = self.entry_rounds != NONE
        sides = (self.senders[travels], self.receivers[travels])
        return max(int(np.bincount(side, minlength=1).max()) for side in sides)

    def schedule(self, process: int) -> np.ndarray:
        """Return the schedule of a process: a `SCHEDULE_ROW` for each round in which it takes part,
        in order."""
        sent, received = self._by_sender.places(process), self._by_receiver.places(process)
        sent, received = (found[self.entry_rounds[found] != NONE] for found in (sent, received))
        rounds = np.union1d(self.entry_rounds[sent], self.entry_rounds[received])
        rows = np.full(len(rounds), NONE, SCHEDULE_ROW)
        rows["round"] = rounds
        at = np.searchsorted(rounds, self.entry_rounds[sent])
        rows["to"][at], rows["sent"][at] = self.receivers[sent], sent
        at = np.searchsorted(rounds, self.entry_rounds[received])
        rows["source"][at], rows["received"][at] = self.senders[received], received
        if process not in self._place:
            return rows
        return np.concatenate([rows, self._relay_rounds(*self._place[process])])

    def place(self, bucket: int) -> BucketPlace:
        """Return the place of a bucket in its payload."""
        payload = int(np.searchsorted(self._first_bucket, bucket, "right")) - 1
        first, end = self._first_bucket[payload : payload + 2].tolist()
        return BucketPlace(payload, bucket - first, end - first)

    def _relay_rounds(self, number: int, member: int) -> np.ndarray:
        """Return the rounds in which a member of a position relays what has entered it."""
        members, num_buckets = np.array(self.positions[number]), self._relayed[number]
        hops = np.arange(1, len(members))
        to, source = (member + hops) % len(members), (member - hops) % len(members)
        turns = np.arange(num_buckets)[:, None]
        rows = np.empty((num_buckets, len(hops)), SCHEDULE_ROW)
        rows["round"] = self.num_entry_rounds + turns * len(hops) + hops - 1
        rows["to"], rows["source"] = members[to], members[source]
        rows["sent"] = self._first_relayed[number] + member * num_buckets + turns
        rows["received"] = self._first_relayed[number] + source * num_buckets + turns
        return rows.ravel()


def push_order(plans: Sequence[Plan], receivers: Receivers) -> PushOrder:
    """Return the order of a push.

    Args:
        plans: the links of each set (`engine_sets.plan_sets`).
        receivers: the processes that receive (`receiving_processes`)."""
    links = [
        Link(link.sender, members[link.member], link.num_bytes)
        for plan, positions in zip(plans, receivers, strict=True)
        for position_links, members in zip(plan, positions, strict=True)
        for link in position_links
    ]
    relaying = [members for positions in receivers for members in positions if len(members) > 1]
    return PushOrder(links, relaying)


def planned_order(
    plans: Sequence[Plan],
    sets: Sequence[range],
    ranks_per_engine: int,
    world_size: int,
    *,
    colocated: bool,
) -> PushOrder:
    """Return the order of a push to engines that do not run yet.

    Args:
        plans: the plans of `sets`.
        sets: engines of each set, by number.
        ranks_per_engine: the positions.
        world_size: the trainer ranks.
        colocated: the engines' ranks are on the trainer ranks' GPUs, in order.
    """
    shared = ranks_in_order(sets, ranks_per_engine, world_size) if colocated else {}
    return push_order(plans, receiving_processes(sets, ranks_per_engine, world_size, shared))


def receiving_processes(
    sets: Sequence[range],
    ranks_per_engine: int,
    world_size: int,
    shared: Mapping[EngineRank, int],
) -> Receivers:
    """Return the process that receives for each engine rank: the trainer rank that shares its GPU,
    or the engine rank itself, numbered after the trainer ranks.

    Args:
        sets: engines of each set, by number.
        ranks_per_engine: positions of an engine.
        world_size: trainer ranks.
        shared: the trainer rank on the GPU of each engine rank that shares one."""
    return [
        [
            [
                shared.get(
                    (index, member, position), world_size + engine * ranks_per_engine + position
                )
                for member, engine in enumerate(engines)
            ]
            for position in range(ranks_per_engine)
        ]
        for index, engines in enumerate(sets)
    ]


class _Grouped:
    """The places of equal values."""

    def __init__(self, values: np.ndarray):
        self._order = np.argsort(values, kind="stable")
        self._ends = np.cumsum(np.bincount(values, minlength=1))

    def places(self, value: int) -> np.ndarray:
        if value >= len(self._ends):
            return self._order[:0]
        return self._order[self._ends[value - 1] if value else 0 : self._ends[value]]


def _divided(num_bytes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the bytes of each bucket where `num_bytes` are divided into `counts` buckets."""
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    num_bytes, counts = np.repeat(num_bytes, counts), np.repeat(counts, counts)
    return num_bytes * (numbers + 1) // counts - num_bytes * numbers // counts


def _entry_rounds(sender: np.ndarray, receiver: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the round in which each bucket of the links enters its receiver, or NONE where that is
    the sender.

    Greedy matchings: each round takes the links of the busiest processes first, so that few have
    more left than the others. The shipped recipes need at most 1.04 times the least number."""
    rounds = np.full(counts.sum(), NONE, np.int32)
    left = np.where(sender == receiver, 0, counts)
    size = int(max(sender.max(initial=0), receiver.max(initial=0))) + 1
    out = np.bincount(sender, left, size).astype(np.int64)
    into = np.bincount(receiver, left, size).astype(np.int64)
    following, number = np.cumsum(counts) - counts, 0
    waiting = np.flatnonzero(left)
    while len(waiting):
        load = np.maximum(out[sender[waiting]], into[receiver[waiting]])
        busiest = waiting[np.lexsort((waiting, -left[waiting], -load))]
        chosen = _matching(busiest.tolist(), sender[busiest].tolist(), receiver[busiest].tolist())
        rounds[following[chosen]] = number
        following[chosen] += 1
        left[chosen] -= 1
        out[sender[chosen]] -= 1
        into[receiver[chosen]] -= 1
        waiting, number = waiting[left[waiting] > 0], number + 1
    return rounds


def _matching(links: list[int], senders: list[int], receivers: list[int]) -> np.ndarray:
    """Return links, in order of preference, no two of which share a sender or a receiver."""
    sending, receiving, chosen = set(), set(), []
    for link, sender, receiver in zip(links, senders, receivers, strict=True):
        if sender not in sending and receiver not in receiving:
            sending.add(sender)
            receiving.add(receiver)
            chosen.append(link)
    return np.array(chosen)
