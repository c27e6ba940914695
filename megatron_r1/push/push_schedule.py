"""The buckets that each rank sends and receives in every round of a push over NCCL
(`matching.rounds`), with their peers and communicators.

A set whose engine ranks have GPUs of their own has a communicator of the trainer ranks and these,
in this order. Where all are on trainer ranks' GPUs, the trainer ranks' own is used. Where a
process has calls of several communicators in a round, it makes a group of each, the trainer's
first, then by set. Every process splits a round in this order, so the proof of `matching.rounds`
holds for the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_r1.push.matching.planned_links import EngineRankId, EngineSetPlan
from megatron_r1.push.matching.rounds import NO_BUCKET, receiving_processes, schedule_rounds
from megatron_r1.push.protocol import PublishedTransfer, RankRounds


class PayloadId(NamedTuple):
    """Identifies a payload.

    Attributes:
        engine_set_index: the set, by its number in `PushSchedule`.
        member: the engine that receives or relays the bytes, by its number in the set.
        engine_rank: the rank within that engine.
        trainer_rank: the trainer rank that sends the bytes; None for those that the engine rank
            relays."""

    engine_set_index: int
    member: int
    engine_rank: int
    trainer_rank: int | None


@dataclass(frozen=True)
class ScheduledTransfer:
    """A send or a receive of a bucket, in a round.

    Attributes:
        is_relayed: whether the bucket is relayed from engine to engine.
        round: its number, from 0 (`matching.rounds`).
        is_send: a send, not a receive.
        peer: the other side's rank in the communicator.
        payload_id: the payload that the bucket is a part of.
        number: the bucket of the payload, counted from 0.
        count: the buckets of the payload."""

    is_relayed: bool
    round: int
    is_send: bool
    peer: int
    payload_id: PayloadId
    number: int
    count: int


class PushSchedule:
    """The rounds of a push to sets that are connected together.

    Args:
        plans: the sets' plans (`planned_links.plan_sets`).
        sets: the engines of each set, numbered through.
        ranks_per_engine: the ranks of an engine.
        world_size: the trainer ranks.
        colocated_ranks: the trainer ranks on engine ranks' GPUs.
        schedule_number: the number of this schedule, in the order of connecting.

    Attributes:
        receivers: the process that receives for each engine rank (`receiving_processes`).
        round_schedule: which process sends each bucket, to which, in which round.
        payload_ids: the payloads, as `round_schedule` numbers them."""

    def __init__(
        self,
        plans: Sequence[EngineSetPlan],
        sets: Sequence[range],
        ranks_per_engine: int,
        world_size: int,
        colocated_ranks: Mapping[EngineRankId, int],
        schedule_number: int,
    ):
        self.schedule_number, self.world_size = schedule_number, world_size
        self.receivers = receiving_processes(sets, ranks_per_engine, world_size, colocated_ranks)
        self.round_schedule = schedule_rounds(plans, self.receivers)
        # In the order in which `schedule_rounds` and `RoundSchedule` number them.
        self.payload_ids = [
            PayloadId(index, link.member, engine_rank, link.trainer_rank)
            for index, plan in enumerate(plans)
            for engine_rank, links in enumerate(plan)
            for link in links
        ]
        self.payload_ids += [
            PayloadId(index, member, engine_rank, None)
            for index, engine_set_receivers in enumerate(self.receivers)
            for engine_rank, members in enumerate(engine_set_receivers)
            if len(members) > 1
            for member in range(len(members))
        ]
        self._ranks = [
            {
                process: rank
                for rank, process in enumerate(
                    self._engine_processes(engine_set_receivers), world_size
                )
            }
            for engine_set_receivers in self.receivers
        ]

    def transfers(self, process: int) -> Iterator[ScheduledTransfer]:
        """Yield the sends and receives of a process in order; of a round, the send comes first."""
        num_scatter_buckets = self.round_schedule.num_scatter_buckets
        for row in self.round_schedule.rounds_of(process):
            for is_send, bucket, peer in (
                (True, row["sent_bucket"], row["destination"]),
                (False, row["received_bucket"], row["source"]),
            ):
                if bucket != NO_BUCKET:
                    index = self.round_schedule.bucket_index(int(bucket))
                    payload_id = self.payload_ids[index.payload]
                    yield ScheduledTransfer(
                        is_relayed=bool(bucket >= num_scatter_buckets),
                        round=int(row["round"]),
                        is_send=is_send,
                        peer=self._ranks[payload_id.engine_set_index].get(int(peer), int(peer)),
                        payload_id=payload_id,
                        number=index.number,
                        count=index.count,
                    )

    def local_copies(self, process: int) -> Iterator[PayloadId]:
        """Yield the payloads that a trainer rank copies, since it receives for the engine rank."""
        for payload_id in self.payload_ids:
            if payload_id.trainer_rank == process == self._receiving_process(payload_id):
                yield payload_id

    def colocated_engine_rank(self, index: int, process: int) -> tuple[int, int] | None:
        """Return (member, engine rank) of the rank of a set that a trainer rank receives for."""
        for engine_rank, members in enumerate(self.receivers[index]):
            if process in members:
                return members.index(process), engine_rank
        return None

    def has_shared_gpus(self, index: int) -> bool:
        """Return whether trainer ranks receive for engine ranks of a set."""
        return any(p < self.world_size for members in self.receivers[index] for p in members)

    def communicator_size(self, index: int) -> int:
        """Return the ranks of a set's communicator; 0 where it has none."""
        return self.world_size + len(self._ranks[index]) if self._ranks[index] else 0

    def communicator_rank_ids(self, index: int, engine_rank: int | None = None) -> list[str]:
        """Return the ranks of engines that are in a set's communicator, each "member/engine rank":
        those with one engine rank, or all."""
        return [
            f"{member}/{rank}"
            for rank, members in enumerate(self.receivers[index])
            if engine_rank in (None, rank)
            for member, process in enumerate(members)
            if process >= self.world_size
        ]

    def rank_rounds(self, index: int, engine_rank: int) -> list[RankRounds | None]:
        """Return what equal ranks of a set's engines run, by member; None for one that a trainer
        rank receives for."""
        rank_ids = self.communicator_rank_ids(index, engine_rank)
        return [
            self._rank_rounds(index, process, rank_ids) if process >= self.world_size else None
            for process in self.receivers[index][engine_rank]
        ]

    def _rank_rounds(self, index: int, process: int, rank_ids: list[str]) -> RankRounds:
        phases: tuple[dict[int, list[Any]], dict[int, list[Any]]] = ({}, {})
        for transfer in self.transfers(process):
            _, member, _, trainer_rank = transfer.payload_id
            source = -1 - member if trainer_rank is None else trainer_rank
            pair = phases[transfer.is_relayed].setdefault(transfer.round, [None, None])
            pair[0 if transfer.is_send else 1] = PublishedTransfer(
                transfer.peer, source, transfer.number, transfer.count
            )
        scatter, relay = ([tuple(pair) for pair in phase.values()] for phase in phases)
        rank, communicator_size = self._ranks[index][process], self.communicator_size(index)
        return RankRounds(rank, communicator_size, rank_ids, scatter, relay)

    def _receiving_process(self, payload_id: PayloadId) -> int:
        return self.receivers[payload_id.engine_set_index][payload_id.engine_rank][
            payload_id.member
        ]

    def _engine_processes(self, engine_set_receivers: Sequence[Sequence[int]]) -> list[int]:
        """Return the processes of a set that are no trainer ranks, in order."""
        return sorted(
            p for members in engine_set_receivers for p in members if p >= self.world_size
        )
