"""Plans and creates the links from a trainer rank to sets of engines (`plan.engine_sets`): from
what the engines offer to receive, which trainer rank 0 reads for all ranks, to the slices of this
rank's parameters that each link carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import msgspec
from torch import Tensor

from megatron_r1.weight_sync.ordered_sets import OrderedSets
from megatron_r1.weight_sync.plan.engine_sets import (
    EngineRank,
    Entry,
    Plan,
    entries,
    largest_bundle,
    sent_bytes,
)
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.ranks import EngineLayout, TrainerGrid
from megatron_r1.weight_sync.plan.receiver_layout import Encoding, ReceiverLayout
from megatron_r1.weight_sync.plan.tensors import CountBytes, Region, fp8_bytes, plain_bytes
from megatron_r1.weight_sync.rendezvous import (
    EXPECTED_ERRORS,
    PositionPlan,
    ReceiverInfo,
    TrainerRendezvous,
    deliveries_to,
)
from megatron_r1.weight_sync.round_sender import Served, SetRounds
from megatron_r1.weight_sync.table import SlotTable
from megatron_r1.weight_sync.transports import sender_class
from megatron_r1.weight_sync.transports.base import Sender
from megatron_r1.weights.layout import Shard
from megatron_r1.weights.local import merged
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stored.fp8 import STORED
from megatron_r1.weights.stored.fp8_blocks import quantize


@dataclass(eq=False)
class ParameterSlice:
    """The `region` of an HF tensor inside a parameter that holds `piece` of that tensor."""

    parameter: Tensor
    piece: Piece
    region: Region
    _view: Tensor | None = field(default=None, init=False, repr=False)
    _address: int = field(default=0, init=False, repr=False)
    """Address of the parameter's memory when `_view` was made, which keeps that memory in use."""

    @property
    def is_held(self) -> bool:
        """Whether the piece covers the region."""
        piece, region = self.piece, self.region
        start, end = (region.top, region.bottom) if piece.dim == 0 else (region.left, region.right)
        return piece.hf_start <= start and end <= piece.hf_start + piece.length

    @property
    def is_merged(self) -> bool:
        """Whether the values are those of a weight with an adapter, computed when they are read."""
        return hasattr(self.parameter, "adapter")

    def values(self) -> Tensor:
        """Return the values (height, width): a view, the same one while the parameter's memory is
        the same, or the merged values."""
        if self.is_merged:
            return merged(self.parameter, *self._local_slices())
        if self._view is None or self._address != self.parameter.data_ptr():
            matrix = self.parameter.detach()
            matrix = matrix if matrix.dim() > 1 else matrix[:, None]
            self._view = matrix[self._local_slices()]
            self._address = self.parameter.data_ptr()
        return self._view

    def _local_slices(self) -> tuple[slice, slice]:
        """Return the region's rows and columns in the parameter."""
        region, piece = self.region, self.piece
        move = piece.local_start - piece.hf_start
        down, right = (move, 0) if piece.dim == 0 else (0, move)
        rows = slice(region.top + down, region.bottom + down)
        return rows, slice(region.left + right, region.right + right)


class EncodedSlices:
    """The tensors of one push to one engine rank, computed when they are read.

    "codes" and "scales" are the two results of `stored.fp8_blocks.quantize` for a slice of whole
    blocks: float8 of its shape, and one fp32 per 128 x 128 block. One computation gives both. To
    take little memory, only the codes or merged values that were read last are kept, and scales
    until they are read."""

    def __init__(self, slices: Iterable[tuple[ParameterSlice, Encoding]]):
        self._slices = list(slices)
        self._last: tuple[int, Tensor] | None = None
        self._scales: dict[ParameterSlice, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        """Return the values (height, width) of one delivery, in the trainer's dtype if plain."""
        source, encoding = self._slices[index]
        if encoding == "plain" and not source.is_merged:
            return source.values()
        if encoding == "scales":
            scales = self._scales.pop(source, None)
            values = quantize(source.values())[1] if scales is None else scales
        elif self._last and self._last[0] == index:  # the next rows of the same delivery
            return self._last[1]
        else:
            self._last = None  # frees the last values before the next are computed
            if encoding == "plain":
                values = source.values()
            else:
                values, self._scales[source] = quantize(source.values())
        self._last = (index, values)
        return values


class Offers(msgspec.Struct):
    """What rank 0 has read, in the form in which it is passed on to the other trainer ranks."""

    sent: list[float]
    """Bytes per push that each trainer rank sends to the sets already connected."""
    tables: list[list[SlotTable]] = []
    """Tables of one engine, by engine rank; one list for all sets with the same tables."""
    sets: dict[str, tuple[int, list[list[str]]]] = {}
    """Set -> (index into `tables`, addresses by engine and rank)."""
    problems: dict[str, str] = {}
    """Set -> why it cannot connect."""


def read_offers(
    sets: Mapping[str, Sequence[TrainerRendezvous]],
    ranks_per_engine: int,
    pushed: Sequence[str],
    sent: list[float],
) -> Offers:
    """Return the offers of these sets' engines; problems are also reported to the set.

    sets: the rendezvous of each engine of a set. pushed: names of the tensors of a push. sent: see
    `Offers`."""
    offers = Offers(sent)
    for name, engines in sets.items():
        try:
            receivers = [engine.read_receivers(ranks_per_engine) for engine in engines]
            tables = _common_tables(receivers)
            _check_all_taken(tables, pushed)
        except EXPECTED_ERRORS as error:
            offers.problems[name] = f"{type(error).__name__}: {error}"
            engines[0].report_error(offers.problems[name])
            continue
        # Equal tables are one entry, so that ranks get them and plan for them only once.
        if tables not in offers.tables:
            offers.tables.append(tables)
        addresses = [[receiver.address for receiver in ranks] for ranks in receivers]
        offers.sets[name] = offers.tables.index(tables), addresses
    return offers


def _common_tables(engines: Sequence[Sequence[ReceiverInfo]]) -> list[SlotTable]:
    """Return the tables of one engine's ranks. Raises ValueError where engines differ."""
    tables = [receiver.table for receiver in engines[0]]
    for engine, receivers in enumerate(engines):
        for rank, receiver in enumerate(receivers):
            if receiver.table != tables[rank]:
                raise ValueError(
                    f"rank {rank} of engine {engine} needs other tensors than the same rank of "
                    "engine 0"
                )
    return tables


def _check_all_taken(tables: Sequence[SlotTable], pushed: Sequence[str]) -> None:
    """Raise ValueError where no rank of an engine takes one of the pushed tensors: the engine would
    go on with the values it started with."""
    taken = {slot.name for table in tables for slot in table.slots}
    left = [name for name in pushed if name not in taken]
    if left:
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise ValueError(f"the engine takes no pushes of {len(left)} tensors: {names}")


HeldPieces = Mapping[str, Sequence[tuple[Tensor, Piece]]]
"""HF name -> the parameters that hold pieces of that tensor."""


class PushLink(NamedTuple):
    """The link to a rank of engine number `member` of the set: the sending end of the
    transport, and the data of each delivery over it."""

    member: int
    end: Sender
    slices: list[tuple[ParameterSlice, Encoding]]


@dataclass
class LinkedSet:
    """A set of engines, with the links of this rank to it.

    rendezvous: of each engine with this rank. sent: the bytes that each trainer rank sends to the
    set in a push. rounds: this rank's part of a push over NCCL."""

    rendezvous: list[TrainerRendezvous]
    sent: list[float]
    links: list[PushLink] = field(default_factory=list)
    rounds: SetRounds | None = None

    @property
    def num_bytes(self) -> int:
        """The bytes that this rank sends to the set per push."""
        ends = [link.end for link in self.links]
        return sum(delivery.num_bytes(end.table) for end in ends for delivery in end.deliveries)

    def close(self) -> None:
        for link in self.links:
            link.end.close()
        if self.rounds is not None:
            self.rounds.close()


class LinkPlanner:
    """Plans the links of all trainer ranks, and creates those of rank `rank` of `grid`.

    Every trainer rank computes the same plan, and publishes a part of it for the engines. held,
    stages, gpus: see `WeightSender`."""

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        held: HeldPieces,
        *,
        rank: int,
        stages: list[list[Shard]] | None,
        gpus: Sequence[str],
    ):
        self.hf, self.grid, self.held, self.rank, self.stages = hf, grid, held, rank, stages
        self._rank_of_gpu = {gpu: rank for rank, gpu in enumerate(gpus)}
        self._num_orders = 0

    def create_links(
        self,
        rendezvous: Mapping[str, list[TrainerRendezvous]],
        offers: Offers,
        engine_layout: EngineLayout,
        transport: str,
    ) -> tuple[dict[str, LinkedSet], dict[str, str]]:
        """Return this rank's links by set, not connected yet, and the problems by set; a set with a
        problem may have some links.

        rendezvous: of each engine of a set. engine_layout: of one engine."""
        created: dict[str, LinkedSet] = {}
        problems: dict[str, str] = {}
        make_end = sender_class(transport)
        for index, tables in enumerate(offers.tables):
            names = [name for name, (offered, _) in offers.sets.items() if offered == index]
            try:
                needs = ReceiverLayout(tables)
                planner = Planner(self.hf, self.grid, engine_layout, self.stages, needs)
                ends = list(accumulate(len(rendezvous[name]) for name in names))
                sets = [range(*edges) for edges in pairwise([0, *ends])]
                shared = self._shared_gpus([offers.sets[name][1] for name in names])
                largest, num_bytes = largest_bundle(transport), _byte_count(tables)
                plans = entries(planner, num_bytes, sets, offers.sent, largest)
                order = None
                if transport == "nccl":
                    self._num_orders += 1
                    ranks, world = engine_layout.ranks_per_engine, self.grid.world
                    order = OrderedSets(plans, sets, ranks, world, shared, self._num_orders)
            except ValueError as error:
                problems |= dict.fromkeys(names, f"{type(error).__name__}: {error}")
                continue
            for turn, (name, plan) in enumerate(zip(names, plans, strict=True)):
                linked = LinkedSet(rendezvous[name], sent_bytes(plan, self.grid.world))
                if order is not None:
                    linked.rounds = SetRounds(rendezvous[name], order, turn, self.rank)
                created[name] = linked
                receivers = [
                    [ReceiverInfo(*of_rank) for of_rank in zip(tables, addresses, strict=True)]
                    for addresses in offers.sets[name][1]
                ]
                try:
                    self._link_set(linked, needs, plan, receivers, make_end, turn)
                except EXPECTED_ERRORS as error:
                    problems[name] = f"{type(error).__name__}: {error}"
        return created, problems

    def _shared_gpus(self, addresses: Sequence[list[list[str]]]) -> dict[EngineRank, int]:
        """Return the trainer ranks on engine ranks' GPUs, which are the addresses over NCCL."""
        return {
            (index, engine, position): self._rank_of_gpu[address]
            for index, engines in enumerate(addresses)
            for engine, ranks in enumerate(engines)
            for position, address in enumerate(ranks)
            if address in self._rank_of_gpu
        }

    def _link_set(
        self,
        linked: LinkedSet,
        needs: ReceiverLayout,
        plan: Plan,
        receivers: Sequence[Sequence[ReceiverInfo]],
        make_end: Callable[..., Sender],
        turn: int,
    ) -> None:
        """Create this rank's links to a set, and publish the plans of some positions.

        receivers: by engine and rank. turn: number of the set."""
        for position, position_entries in enumerate(plan):
            # Every rank has computed all plans; each publishes about as many.
            publishes = (turn + position) % self.grid.world == self.rank
            at_position = [ranks[position] for ranks in receivers]
            self._link_position(
                linked, needs, position, position_entries, at_position, make_end, publishes
            )

    def _link_position(
        self,
        linked: LinkedSet,
        needs: ReceiverLayout,
        position: int,
        position_entries: Sequence[Entry],
        receivers: Sequence[ReceiverInfo],
        make_end: Callable[..., Sender],
        publishes: bool,
    ) -> None:
        """Create this rank's links to one position, and publish the position's plan if
        `publishes`."""
        plan: PositionPlan = [[] for _ in linked.rendezvous]
        served = linked.rounds.served_members(position) if linked.rounds is not None else []
        for entry in position_entries:
            if not (publishes or served) and entry.sender != self.rank:
                continue
            found = [
                (delivery, encoding, (item.name, region))
                for item, region, _ in entry.parts
                for delivery, encoding in needs.deliveries(position, item.name, item.shape, region)
            ]
            found.sort(key=lambda each: each[0].slot)
            deliveries = [delivery for delivery, _, _ in found]
            plan[entry.member].append((entry.sender, deliveries))
            if entry.sender == self.rank:
                rendezvous, receiver = linked.rendezvous[entry.member], receivers[entry.member]
                end = make_end(rendezvous, self.rank, position, receiver)
                # Codes and scales of a region come from one slice, which is quantized once.
                held = {source: self._slice(*source) for _, _, source in found}
                slices = [(held[source], encoding) for _, encoding, source in found]
                linked.links.append(PushLink(entry.member, end, slices))
                end.plan(deliveries)
        for member in served:
            assert linked.rounds is not None
            entering = deliveries_to(plan, member)
            linked.rounds.served[member, position] = Served(receivers[member].table, entering)
        if publishes:
            linked.rendezvous[0].publish_plan(position, plan)
            if linked.rounds is not None:
                linked.rounds.publish(position)

    def _slice(self, name: str, region: Region) -> ParameterSlice:
        """Return the region of an HF tensor in a parameter of this rank. Raises ValueError."""
        for parameter, piece in self.held.get(name, ()):
            found = ParameterSlice(parameter, piece, region)
            if found.is_held:
                return found
        raise ValueError(f"this rank does not hold {region} of {name}")


def _byte_count(tables: list[SlotTable]) -> CountBytes:
    """Return the function that counts a slice's bytes, to balance engines and senders."""
    dtypes = {slot.dtype for table in tables for slot in table.slots}
    if STORED in dtypes:
        return fp8_bytes
    return plain_bytes("float32" if dtypes == {"float32"} else "bfloat16")
