"""The order of a push as each rank of the connected sets runs it: which block of bytes it sends to
which rank of which communicator, and receives, in every round (`plan.rounds`).

A set whose engine ranks have GPUs of their own has a communicator of the trainer ranks and these,
in this order. Where all are on trainer ranks' GPUs, the trainer ranks' own is used. A round in
which a process has calls of two communicators is two groups, the trainer's first, then by set: the
same subdivision of a round everywhere, so what `rounds` says of rounds holds for these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_r1.push.plan.engine_sets import EngineRank, Plan
from megatron_r1.push.plan.rounds import NONE, push_order, receiving_processes
from megatron_r1.push.rendezvous import Half, RankRounds


class Block(NamedTuple):
    """Bytes for rank `position` of engine `member` of a set: those that trainer rank `sender`
    sends; or, with sender None, those that this rank passes on."""

    set_index: int
    member: int
    position: int
    sender: int | None


class Call(NamedTuple):
    """A send or a receive, in a round, of portion `number` of the `of` equal ones of `block`.
    peer: rank in the communicator."""

    is_passing: bool
    round: int
    is_send: bool
    peer: int
    block: Block
    number: int
    of: int


class OrderedSets:
    """The order of a push to sets that are connected together. plans: their `entries`. sets: the
    engines of each, numbered through. shared: the trainer ranks on engine ranks' GPUs. number: of
    this order, in the order of connecting."""

    def __init__(
        self,
        plans: Sequence[Plan],
        sets: Sequence[range],
        ranks_per_engine: int,
        world: int,
        shared: Mapping[EngineRank, int],
        number: int,
    ):
        self.number, self.world = number, world
        self.receivers = receiving_processes(sets, ranks_per_engine, world, shared)
        self.order = push_order(plans, self.receivers)
        # In the order in which `push_order` and `PushOrder` number them.
        self.blocks = [
            Block(index, entry.member, position, entry.sender)
            for index, plan in enumerate(plans)
            for position, entries in enumerate(plan)
            for entry in entries
        ]
        self.blocks += [
            Block(index, member, position, None)
            for index, positions in enumerate(self.receivers)
            for position, members in enumerate(positions)
            if len(members) > 1
            for member in range(len(members))
        ]
        self._ranks = [
            {process: world + place for place, process in enumerate(self._outside(positions))}
            for positions in self.receivers
        ]

    def calls(self, process: int) -> Iterator[Call]:
        """Yield the calls of a process in order; of a round, the send comes first."""
        num_entering = self.order.num_entering
        for row in self.order.part(process):
            for is_send, bucket, peer in (
                (True, row["sent"], row["to"]),
                (False, row["received"], row["source"]),
            ):
                if bucket != NONE:
                    number, *portion = self.order.portion(int(bucket))
                    block, passes = self.blocks[number], bool(bucket >= num_entering)
                    rank = self._ranks[block.set_index].get(int(peer), int(peer))
                    yield Call(passes, int(row["round"]), is_send, rank, block, *portion)

    def copies(self, process: int) -> Iterator[Block]:
        """Yield the blocks that a trainer rank copies, since it receives for the engine rank."""
        for block in self.blocks:
            if block.sender == process == self._receiver(block):
                yield block

    def served(self, index: int, process: int) -> tuple[int, int] | None:
        """Return the engine rank of a set, (member, position), that a trainer rank receives for."""
        for position, members in enumerate(self.receivers[index]):
            if process in members:
                return members.index(process), position
        return None

    def has_served(self, index: int) -> bool:
        """Return whether trainer ranks receive for engine ranks of a set."""
        return any(p < self.world for members in self.receivers[index] for p in members)

    def size(self, index: int) -> int:
        """Return the ranks of a set's communicator; 0 where it has none."""
        return self.world + len(self._ranks[index]) if self._ranks[index] else 0

    def names(self, index: int, position: int | None = None) -> list[str]:
        """Return the engine ranks that are in a set's communicator, "member/position", of one
        position or of all."""
        return [
            f"{member}/{at}"
            for at, members in enumerate(self.receivers[index])
            if position in (None, at)
            for member, process in enumerate(members)
            if process >= self.world
        ]

    def rank_rounds(self, index: int, position: int) -> list[RankRounds | None]:
        """Return what the ranks at a position of a set run, by member; None for one that a trainer
        rank receives for."""
        names = self.names(index, position)
        return [
            self._rank_rounds(index, process, names) if process >= self.world else None
            for process in self.receivers[index][position]
        ]

    def _rank_rounds(self, index: int, process: int, names: list[str]) -> RankRounds:
        phases: tuple[dict, dict] = ({}, {})
        for call in self.calls(process):
            block = -1 - call.block.member if call.block.sender is None else call.block.sender
            half = Half(call.peer, block, call.number, call.of)
            pair = phases[call.is_passing].setdefault(call.round, [None, None])
            pair[0 if call.is_send else 1] = half
        entering, passing = ([tuple(pair) for pair in phase.values()] for phase in phases)
        rank, size = self._ranks[index][process], self.size(index)
        return RankRounds(rank, size, names, entering, passing)

    def _receiver(self, block: Block) -> int:
        return self.receivers[block.set_index][block.position][block.member]

    def _outside(self, positions: Sequence[Sequence[int]]) -> list[int]:
        """Return the processes of a set that are no trainer ranks, in order."""
        return sorted(p for members in positions for p in members if p >= self.world)
