"""Plans and creates the links from a trainer rank to sets of engines (`matching.planned_links`).

It leads from the slot tables that engines publish (`published_sharding`) to the regions of this
rank's parameters that each link sends (`parameter_regions`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats.published_layout import FP8_DTYPE
from megatron_r1.models.weights.layout import Shard
from megatron_r1.models.weights.splits import Piece
from megatron_r1.models.weights.table import WeightTable
from megatron_r1.push.matching.layouts import EngineLayout, TrainerGrid
from megatron_r1.push.matching.matched_regions import MatchedRegions
from megatron_r1.push.matching.planned_links import (
    EngineSetPlan,
    PlannedLink,
    max_group_fraction,
    plan_sets,
    sent_bytes,
)
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import CountBytes, fp8_bytes, plain_bytes
from megatron_r1.push.parameter_regions import Encoding, ParameterRegion
from megatron_r1.push.protocol import EngineRankChunks, ReceiverInfo
from megatron_r1.push.published_sharding import PublishedSharding
from megatron_r1.push.push_schedule import PushSchedule
from megatron_r1.push.receivers import EngineSetReceivers
from megatron_r1.push.rendezvous import ENGINE_SET_FAILURE_ERRORS, TrainerRendezvous
from megatron_r1.push.round_sender import EngineSetRounds
from megatron_r1.push.slots import SlotTable
from megatron_r1.push.transports import sender_class
from megatron_r1.push.transports.base import Sender

HeldPieces = Mapping[str, Sequence[tuple[Tensor, Piece]]]
"""HF name -> the parameters that hold pieces of that tensor."""


class ConnectedLink(NamedTuple):
    """The link from this trainer rank to an engine rank.

    Attributes:
        member: the engine, by its number in the set.
        sender: this end of the transport.
        regions: the data of each chunk."""

    member: int
    sender: Sender
    regions: list[tuple[ParameterRegion, Encoding]]


@dataclass
class EngineSetLinks:
    """A set of engines, with the links of this rank to it.

    Attributes:
        rendezvous: this rank's rendezvous with each engine.
        sent_bytes: what each trainer rank sends to the set in a push.
        links: one to each engine rank that this rank sends to.
        engine_set_rounds: this rank's part of a push in rounds.
        push_number_in_set: the number of the set's pushes so far."""

    rendezvous: list[TrainerRendezvous]
    sent_bytes: list[float]
    links: list[ConnectedLink] = field(default_factory=list)
    engine_set_rounds: EngineSetRounds | None = None
    push_number_in_set: int = 0

    @property
    def num_bytes(self) -> int:
        """The bytes that this rank sends to the set per push."""
        senders = [link.sender for link in self.links]
        return sum(chunk.num_bytes(sender.table) for sender in senders for chunk in sender.chunks)

    def close(self) -> None:
        """Close the links to the set's ranks, and its rounds."""
        for link in self.links:
            link.sender.close()
        if self.engine_set_rounds is not None:
            self.engine_set_rounds.close()


class LinkPlanner:
    """Plans the links of all trainer ranks, and creates those of one rank.

    Every trainer rank computes the same plan, and publishes a part of it for the engines.

    Args:
        hf_config: the model's `config.json`.
        grid: the layout of the trainer.
        pieces: this rank's parameters, by the HF tensor of which they hold a piece.
        rank: the trainer rank.
        stages: the shards of the pipeline's virtual stages, default an even spread.
        gpus: the UUID of each rank's GPU, where engines may share it over NCCL.
        weight_table: the weight table of what is pushed, default the model's."""

    def __init__(
        self,
        hf_config: HFConfig,
        grid: TrainerGrid,
        pieces: HeldPieces,
        *,
        rank: int,
        stages: list[list[Shard]] | None,
        gpus: Sequence[str],
        weight_table: WeightTable | None = None,
    ):
        self.hf_config = hf_config
        self.grid = grid
        self.pieces = pieces
        self.rank = rank
        self.stages = stages
        self.weight_table = weight_table
        self._rank_of_gpu = {gpu: rank for rank, gpu in enumerate(gpus)}
        self._num_schedules = 0

    def create_links(
        self,
        rendezvous: Mapping[str, list[TrainerRendezvous]],
        receivers: EngineSetReceivers,
        engine_layout: EngineLayout,
        transport: str,
    ) -> tuple[dict[str, EngineSetLinks], dict[str, str]]:
        """Return this rank's links by set, not connected yet, and the problems by set; a set with a
        problem may have some links.

        Args:
            rendezvous: by set, the rendezvous with each engine.
            receivers: what the engine ranks receive.
            engine_layout: the layout of one engine.
            transport: a key of `base.transports.TRANSPORTS`."""
        links_by_set: dict[str, EngineSetLinks] = {}
        problems: dict[str, str] = {}
        sender_type = sender_class(transport)
        for table_index, tables in enumerate(receivers.tables):
            names = [name for name, (index, _) in receivers.sets.items() if index == table_index]
            addresses = [receivers.sets[name][1] for name in names]
            try:
                sharding = PublishedSharding(tables)
                matched_regions = MatchedRegions(
                    self.hf_config,
                    self.grid,
                    engine_layout,
                    stages=self.stages,
                    sharding=sharding,
                    weight_table=self.weight_table,
                )
                edges = [0, *accumulate(map(len, addresses))]
                sets = [range(*edge) for edge in pairwise(edges)]
                fraction, count_bytes = max_group_fraction(transport), _byte_count(tables)
                plans = plan_sets(
                    matched_regions, count_bytes, sets, receivers.sent_bytes, fraction
                )
                in_rounds = TRANSPORTS[transport].sends_in_rounds
                schedule = self._create_schedule(plans, sets, addresses) if in_rounds else None
            except ValueError as error:
                problems |= dict.fromkeys(names, f"{type(error).__name__}: {error}")
                continue
            for engine_set_index, (name, plan) in enumerate(zip(names, plans, strict=True)):
                engine_set_links = EngineSetLinks(
                    rendezvous[name], sent_bytes(plan, self.grid.world_size)
                )
                if schedule is not None:
                    engine_set_links.engine_set_rounds = EngineSetRounds(
                        rendezvous[name], schedule, engine_set_index, self.rank
                    )
                links_by_set[name] = engine_set_links
                try:
                    for engine_rank, rank_links in enumerate(plan):
                        infos = [
                            ReceiverInfo(tables[engine_rank], ranks[engine_rank])
                            for ranks in addresses[engine_set_index]
                        ]
                        # Every rank has computed all plans; each publishes about as many.
                        publishes = (
                            engine_set_index + engine_rank
                        ) % self.grid.world_size == self.rank
                        self._link_engine_rank(
                            engine_set_links, sharding, rank_links, infos, sender_type, publishes
                        )
                except ENGINE_SET_FAILURE_ERRORS as error:
                    problems[name] = f"{type(error).__name__}: {error}"
        return links_by_set, problems

    def _create_schedule(
        self,
        plans: Sequence[EngineSetPlan],
        sets: Sequence[range],
        addresses: Sequence[list[list[str]]],
    ) -> PushSchedule:
        """Return the rounds of a push.

        Args:
            plans: the plans of `sets`.
            sets: engines of each set, by number.
            addresses: the GPU of each engine rank, by set, member and engine rank."""
        colocated_ranks = {
            (index, member, engine_rank): self._rank_of_gpu[address]
            for index, engines in enumerate(addresses)
            for member, ranks in enumerate(engines)
            for engine_rank, address in enumerate(ranks)
            if address in self._rank_of_gpu
        }
        self._num_schedules += 1
        return PushSchedule(
            plans, sets, len(plans[0]), self.grid.world_size, colocated_ranks, self._num_schedules
        )

    def _link_engine_rank(
        self,
        engine_set_links: EngineSetLinks,
        sharding: PublishedSharding,
        rank_links: Sequence[PlannedLink],
        receivers: Sequence[ReceiverInfo],
        sender_type: type[Sender],
        publishes: bool,
    ) -> None:
        """Create this rank's links to one rank of all engines of a set.

        Args:
            engine_set_links: the set.
            sharding: the regions that the ranks of an engine need.
            rank_links: the planned links of all trainer ranks to that engine rank.
            receivers: table and address of that rank, by member.
            sender_type: the transport's sender.
            publishes: whether this rank publishes the plan of that engine rank."""
        plan: EngineRankChunks = [[] for _ in engine_set_links.rendezvous]
        engine_rank, rounds = rank_links[0].engine_rank, engine_set_links.engine_set_rounds
        receives = rounds is not None and rounds.is_on_gpu_of(engine_rank)
        for link in rank_links:
            if not (publishes or receives) and link.trainer_rank != self.rank:
                continue
            sent_chunks = [
                (chunk, encoding, (item.name, region))
                for item, region, _ in link.regions
                for chunk, encoding in sharding.chunks(engine_rank, item.name, item.shape, region)
            ]
            sent_chunks.sort(key=lambda sent_chunk: sent_chunk[0].slot)
            chunks = [chunk for chunk, _, _ in sent_chunks]
            plan[link.member].append((link.trainer_rank, chunks))
            if link.trainer_rank == self.rank:
                meeting, receiver = engine_set_links.rendezvous[link.member], receivers[link.member]
                sender = sender_type(meeting, self.rank, engine_rank, receiver)
                # Codes and scales of a region come from one tensor, which is quantized once.
                region_of = {
                    source: self._parameter_region(*source) for _, _, source in sent_chunks
                }
                regions = [(region_of[source], encoding) for _, encoding, source in sent_chunks]
                engine_set_links.links.append(ConnectedLink(link.member, sender, regions))
                sender.plan(chunks)
        if rounds is not None and receives:
            rounds.prepare_receive(receivers, plan)
        if publishes:
            rank_rounds = (
                rounds.schedule.rank_rounds(rounds.engine_set_index, engine_rank)
                if rounds
                else None
            )
            engine_set_links.rendezvous[0].publish_plan(engine_rank, plan, rank_rounds)

    def _parameter_region(self, name: str, region: Region) -> ParameterRegion:
        """Return the region of an HF tensor in a parameter of this rank.

        Raises:
            ValueError: this rank does not hold the region.
        """
        for parameter, piece in self.pieces.get(name, ()):
            candidate = ParameterRegion(parameter, piece, region)
            if candidate.is_held:
                return candidate
        raise ValueError(f"this rank does not hold {region} of {name}")


def _byte_count(tables: list[SlotTable]) -> CountBytes:
    """Return the function that counts a region's bytes, to balance engines and senders."""
    dtypes = {slot.dtype for table in tables for slot in table.slots}
    if FP8_DTYPE in dtypes:
        return fp8_bytes
    return plain_bytes("float32" if dtypes == {"float32"} else "bfloat16")
