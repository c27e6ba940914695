"""The order of a push over NCCL (`plan.rounds`) as each rank of the connected sets runs it: the
payloads that a rank sends and receives in every round, with their ranks and communicators.

A set whose engine ranks have GPUs of their own has a communicator of the trainer ranks and these,
in this order. Where all are on trainer ranks' GPUs, the trainer ranks' own is used. A round in
which a process has calls of two communicators is two groups, the trainer's first, then by set: the
same subdivision of a round everywhere, so what `rounds` says of rounds holds for these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1.push.plan.engine_sets import EngineRank, Plan
from megatron_r1.push.plan.rounds import NONE, push_order, receiving_processes
from megatron_r1.push.protocol import (
    RankCall,
    RankRounds,
)


class PayloadId(NamedTuple):
    """Names a payload: the bytes for rank `position` of engine `member` of a set.

    Attributes:
        set_index: the set, by its number in `OrderedSets`.
        member: the engine.
        position: the rank within the engine.
        sender: the trainer rank that sends the bytes; None for those that this engine rank
            relays."""

    set_index: int
    member: int
    position: int
    sender: int | None


@dataclass(frozen=True)
class RoundCall:
    """A send or a receive of a bucket, in a round.

    Attributes:
        is_relayed: whether the bucket is relayed from engine to engine.
        round: its number in the schedule, from 0 (`plan.rounds`).
        is_send: a send, not a receive.
        peer: the other side's rank in the communicator.
        payload: the engine rank that the bytes are for, and the trainer rank that sends them.
        number: the bucket of the payload, counted from 0.
        count: the buckets of the payload."""

    is_relayed: bool
    round: int
    is_send: bool
    peer: int
    payload: PayloadId
    number: int
    count: int


class OrderedSets:
    """The order of a push to sets that are connected together.

    Args:
        plans: the sets' plans (`engine_sets.plan_sets`).
        sets: the engines of each set, numbered through.
        ranks_per_engine: the ranks of an engine.
        world_size: the trainer ranks.
        shared: the trainer ranks on engine ranks' GPUs.
        number: the number of this order, in the order of connecting.

    Attributes:
        receivers: the process that receives for each engine rank (`receiving_processes`).
        order: the rounds.
        payloads: the payloads, as `order` numbers them."""

    def __init__(
        self,
        plans: Sequence[Plan],
        sets: Sequence[range],
        ranks_per_engine: int,
        world_size: int,
        shared: Mapping[EngineRank, int],
        number: int,
    ):
        self.number, self.world_size = number, world_size
        self.receivers = receiving_processes(sets, ranks_per_engine, world_size, shared)
        self.order = push_order(plans, self.receivers)
        # In the order in which `push_order` and `PushOrder` number them.
        self.payloads = [
            PayloadId(index, link.member, position, link.sender)
            for index, plan in enumerate(plans)
            for position, links in enumerate(plan)
            for link in links
        ]
        self.payloads += [
            PayloadId(index, member, position, None)
            for index, positions in enumerate(self.receivers)
            for position, members in enumerate(positions)
            if len(members) > 1
            for member in range(len(members))
        ]
        self._ranks = [
            {process: world_size + place for place, process in enumerate(self._outside(positions))}
            for positions in self.receivers
        ]

    def calls(self, process: int) -> Iterator[RoundCall]:
        """Yield the calls of a process in order; of a round, the send comes first."""
        num_entering = self.order.num_entering
        for row in self.order.schedule(process):
            for is_send, bucket, peer in (
                (True, row["sent"], row["to"]),
                (False, row["received"], row["source"]),
            ):
                if bucket != NONE:
                    place = self.order.place(int(bucket))
                    payload = self.payloads[place.payload]
                    yield RoundCall(
                        is_relayed=bool(bucket >= num_entering),
                        round=int(row["round"]),
                        is_send=is_send,
                        peer=self._ranks[payload.set_index].get(int(peer), int(peer)),
                        payload=payload,
                        number=place.number,
                        count=place.count,
                    )

    def copies(self, process: int) -> Iterator[PayloadId]:
        """Yield the payloads that a trainer rank copies, since it receives for the engine rank."""
        for payload in self.payloads:
            if payload.sender == process == self._receiver(payload):
                yield payload

    def received_by(self, index: int, process: int) -> tuple[int, int] | None:
        """Return the engine rank of a set, (member, position), that a trainer rank receives for."""
        for position, members in enumerate(self.receivers[index]):
            if process in members:
                return members.index(process), position
        return None

    def has_shared_gpus(self, index: int) -> bool:
        """Return whether trainer ranks receive for engine ranks of a set."""
        return any(p < self.world_size for members in self.receivers[index] for p in members)

    def num_ranks(self, index: int) -> int:
        """Return the ranks of a set's communicator; 0 where it has none."""
        return self.world_size + len(self._ranks[index]) if self._ranks[index] else 0

    def names(self, index: int, position: int | None = None) -> list[str]:
        """Return the engine ranks that are in a set's communicator, "member/position", of one
        position or of all."""
        return [
            f"{member}/{at}"
            for at, members in enumerate(self.receivers[index])
            if position in (None, at)
            for member, process in enumerate(members)
            if process >= self.world_size
        ]

    def rank_rounds(self, index: int, position: int) -> list[RankRounds | None]:
        """Return what the ranks at a position of a set run, by member; None for one that a trainer
        rank receives for."""
        names = self.names(index, position)
        return [
            self._rank_rounds(index, process, names) if process >= self.world_size else None
            for process in self.receivers[index][position]
        ]

    def _rank_rounds(self, index: int, process: int, names: list[str]) -> RankRounds:
        phases: tuple[dict, dict] = ({}, {})
        for call in self.calls(process):
            sender, member = call.payload.sender, call.payload.member
            source = -1 - member if sender is None else sender
            rank_call = RankCall(call.peer, source, call.number, call.count)
            pair = phases[call.is_relayed].setdefault(call.round, [None, None])
            pair[0 if call.is_send else 1] = rank_call
        entering, relayed = ([tuple(pair) for pair in phase.values()] for phase in phases)
        rank, num_ranks = self._ranks[index][process], self.num_ranks(index)
        return RankRounds(rank, num_ranks, names, entering, relayed)

    def _receiver(self, payload: PayloadId) -> int:
        return self.receivers[payload.set_index][payload.position][payload.member]

    def _outside(self, positions: Sequence[Sequence[int]]) -> list[int]:
        """Return the processes of a set that are no trainer ranks, in order."""
        return sorted(p for members in positions for p in members if p >= self.world_size)
