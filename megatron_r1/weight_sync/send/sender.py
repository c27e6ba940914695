"""A trainer rank's part of a push: it sends the slices that the plan assigns to this rank
(`plan.entry`), each to one engine rank, straight from the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch
from torch import Tensor
from torch.distributed import Store

from megatron_r1.weight_sync.plan.entry import (
    Entry,
    Neighbours,
    entries,
    largest_over,
    sent_bytes,
)
from megatron_r1.weight_sync.plan.fp8_blocks import pushed_tensors
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.ranks import EngineLayout, TrainerGrid
from megatron_r1.weight_sync.plan.receiver_layout import Encoding, ReceiverLayout
from megatron_r1.weight_sync.plan.tensors import Region, Transfer
from megatron_r1.weight_sync.plan.traffic import ByteCount, fp8_bytes, plain_bytes
from megatron_r1.weight_sync.receive.rendezvous import (
    Failure,
    ReceiverInfo,
    Rendezvous,
    SetFailed,
    TableStore,
)
from megatron_r1.weight_sync.receive.table import Delivery, SlotTable
from megatron_r1.weight_sync.send.slices import EncodedSlices, ParameterSlice
from megatron_r1.weight_sync.transports import sender_class
from megatron_r1.weight_sync.transports.base import Sender
from megatron_r1.weights.layout import Shard
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stored.fp8 import STORED

T = TypeVar("T")
HeldPieces = Mapping[str, Sequence[tuple[Tensor, Piece]]]
"""HF name -> the parameters that hold pieces of that tensor."""
Share = Callable[[bytes | None], bytes]
"""Passes bytes of trainer rank 0 on to all of them."""
EXPECTED = (OSError, RuntimeError, ValueError)
"""Errors that fail a set and not this rank; torch.distributed raises the second."""


class _Link(NamedTuple):
    """The link to one engine rank: the transport's end, and the data of each of its deliveries."""

    engine: int
    end: Sender
    slices: list[tuple[ParameterSlice, Encoding]]


@dataclass
class _Set:
    """A set of engines. sent: the bytes that each trainer rank sends to it per push."""

    meetings: list[Rendezvous]
    sent: list[float]
    links: list[_Link] = field(default_factory=list)


class _Offers(msgspec.Struct):
    """What rank 0 has read of the engines' offers."""

    sent: list[float]
    """Bytes per push that each trainer rank sends to the sets already connected."""
    tables: list[list[SlotTable]] = []
    """Tables of one engine, by engine rank; once for all sets that are alike."""
    sets: dict[str, tuple[int, list[list[str]]]] = {}
    """Set -> (index into `tables`, addresses by engine and rank)."""
    problems: dict[str, str] = {}
    """Set -> why it cannot connect."""


class WeightSender:
    """Sends the weights of rank `rank` of `grid`; every method is called on all trainer ranks.

    held: this rank's parameters of the model that `hf` describes. stages: the shards of the
    pipeline's virtual stages, default an even spread. store: where trainer and engine ranks meet.
    drafts: whether engines draft with the MTP layers. gpus: the UUID of each rank's GPU, where
    engines may share it over NCCL.
    share: see `Share`; not needed for a single rank."""

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        held: HeldPieces,
        store: Store,
        share: Share = lambda value: value or b"",
        *,
        rank: int = 0,
        stages: list[list[Shard]] | None = None,
        drafts: bool = False,
        gpus: Sequence[str] = (),
    ):
        self._rank_on = {gpu: rank for rank, gpu in enumerate(gpus)}
        self.hf, self.grid, self.held, self.stages = hf, grid, held, stages
        self.store, self.share, self.rank, self.drafts = store, share, rank, drafts
        self._sets: dict[str, _Set] = {}
        self._tables = TableStore(store)

    def connect(
        self,
        sets: Sequence[tuple[str, int]],
        layout: dict[str, Any],
        transport: str,
        timeout_seconds: float,
        full_every: int = 1,
        push_seconds: float | None = None,
        gone: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Agree with all engine ranks of these sets on the deliveries of this rank.

        sets: name, unique to every call, and number of engines of each. layout: the fields of
        `EngineLayout`, of one engine. full_every: of so many pushes the first is sent whole, the
        others as differences. push_seconds: limit for a push, default `timeout_seconds`. gone: sets
        to disconnect. Returns "problems" by set, and of the others "num_windows", and "num_bytes"
        and, by set, "num_links" of this rank."""
        for name in gone:
            self.disconnect(name)
        one = EngineLayout(**{**layout, "engines": 1})
        meet = partial(
            Rendezvous,
            self.store,
            timeout_seconds=timeout_seconds,
            push_seconds=push_seconds,
            tables=self._tables,
        )
        meetings = {
            name: [meet(name, member=member, members=members) for member in range(members)]
            for name, members in sets
        }
        offers = self._offers(meetings, one)
        failed = self._plan(meetings, offers, one, transport, full_every)
        present = {name: self._sets[name] for name in offers.sets if name not in failed}
        for name, problem in failed.items():  # first, so that no rank waits for this one
            _report(meetings[name][0], f"trainer rank {self.rank}: {problem}")
        for new in present.values():  # before any wait, which would block this rank's only client
            new.meetings[0].publish_prepared(self.grid.world, len(new.meetings) * one.num_ranks)
        outcomes = run_all([partial(self._connect, new) for new in present.values()])
        failed |= {name: text for name, text in zip(present, outcomes, strict=True) if text}
        for name in failed:
            self.disconnect(name)
        connected = {name: present[name].links for name in present.keys() - failed.keys()}
        links = [link for of_set in connected.values() for link in of_set]
        windows = [table.num_windows for tables in offers.tables for table in tables]
        return {
            "problems": offers.problems | failed,
            "num_windows": max(windows, default=1),
            "num_bytes": sum(d.num_bytes(at.end.table) for at in links for d in at.end.deliveries),
            "num_links": {name: len(of_set) for name, of_set in connected.items()},
        }

    def disconnect(self, name: str) -> None:
        """Close the links to a set, if there are any."""
        if name in self._sets:
            for link in self._sets.pop(name).links:
                link.end.close()

    def send(self, push: int, sets: Sequence[str], gone: Sequence[str] = ()) -> dict[str, Any]:
        """Send the present weights to these sets, over all links at once, as push number `push` of
        each. Rank 0 returns when the engines of each set have passed on all of it.

        gone: sets to disconnect. Returns "problems": a `Failure` by set; one that fails does not
        stop the others."""
        for name in gone:
            self.disconnect(name)
        problems: dict[str, Failure] = {}

        def run(name: str, link: _Link) -> None:
            try:
                for window in range(link.end.table.num_windows):
                    link.end.send(push, window, EncodedSlices(link.slices))
            except SetFailed as error:
                problems.setdefault(name, error.failure)
            except (OSError, RuntimeError) as error:
                text = f"trainer rank {self.rank}: {type(error).__name__}: {error}"
                failure = _report(link.end.rendezvous, text, link.engine)
                problems.setdefault(name, failure)

        present = {name: self._sets[name] for name in sets if name in self._sets}
        run_all([partial(run, name, link) for name, one in present.items() for link in one.links])
        for name, one in present.items():
            if self.rank == 0 and len(one.meetings) > 1 and name not in problems:
                try:
                    one.meetings[0].await_complete(push)
                except SetFailed as error:
                    problems[name] = error.failure
                except RuntimeError as error:
                    late = f"an engine has not passed on all of push {push}: {error}"
                    problems[name] = _report(one.meetings[0], late)
        return {"problems": {name: msgspec.to_builtins(f) for name, f in problems.items()}}

    def slice_of(self, name: str, region: Region) -> ParameterSlice:
        for parameter, piece in self.held.get(name, ()):
            part = ParameterSlice(parameter, piece, region)
            if part.is_held:
                return part
        raise ValueError(f"this rank does not hold {region} of {name}")

    def _offers(self, meetings: dict[str, list[Rendezvous]], one: EngineLayout) -> _Offers:
        """Return what the engines offer, which rank 0 reads for all."""
        if self.rank:
            return msgspec.msgpack.decode(self.share(None), type=_Offers)
        by_set = [one_set.sent for one_set in self._sets.values()]
        found = _Offers([sum(of_rank) for of_rank in zip(*by_set, strict=True)])
        for name, members in meetings.items():
            try:
                receivers = [member.receivers(one.num_ranks) for member in members]
                tables = _common_tables(receivers)
                self._check_all_taken(tables)
            except EXPECTED as error:
                found.problems[name] = f"{type(error).__name__}: {error}"
                _report(members[0], found.problems[name])
                continue
            if tables not in found.tables:
                found.tables.append(tables)
            addresses = [[receiver.address for receiver in of_one] for of_one in receivers]
            found.sets[name] = found.tables.index(tables), addresses
        self.share(msgspec.msgpack.encode(found))
        return found

    def _check_all_taken(self, tables: Sequence[SlotTable]) -> None:
        """Raise ValueError where no rank of an engine takes a tensor of the model, or of its MTP
        layers if it drafts with them: the engine would go on with the values it started with."""
        taken = {slot.name for table in tables for slot in table.slots}
        pushed = pushed_tensors(self.hf, fp8=False, drafts=self.drafts)
        left = [name for name, _ in pushed if name not in taken]
        if left:
            names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            raise ValueError(f"the engine takes no pushes of {len(left)} tensors: {names}")

    def _plan(
        self,
        meetings: dict[str, list[Rendezvous]],
        offers: _Offers,
        one: EngineLayout,
        transport: str,
        full_every: int,
    ) -> dict[str, str]:
        """Plan all sets, publish the positions that fall to this rank, and prepare this rank's
        links. Return the problems by set."""
        failed: dict[str, str] = {}
        make = partial(sender_class(transport), full_every=full_every)
        for index, tables in enumerate(offers.tables):
            names = [name for name, (at, _) in offers.sets.items() if at == index]
            try:
                needs = ReceiverLayout(self.hf, one, tables)
                planner = Planner(self.hf, self.grid, one, self.stages, needs)
                members = [range(len(meetings[name])) for name in names]
                largest = largest_over(transport)
                near = self._neighbours([offers.sets[name][1] for name in names])
                plans = entries(planner, _count(tables), members, offers.sent, largest, near)
            except ValueError as error:
                failed |= dict.fromkeys(names, f"{type(error).__name__}: {error}")
                continue
            for turn, (name, plan) in enumerate(zip(names, plans, strict=True)):
                self._sets[name] = new = _Set(meetings[name], sent_bytes(plan, self.grid.world))
                addresses = offers.sets[name][1]
                try:
                    for position, of_position in enumerate(plan):
                        publishes = (turn + position) % self.grid.world == self.rank
                        receivers = [
                            ReceiverInfo(tables[position], of_one[position]) for of_one in addresses
                        ]
                        self._prepare(new, needs, position, of_position, receivers, make, publishes)
                except EXPECTED as error:
                    failed[name] = f"{type(error).__name__}: {error}"
        return failed

    def _neighbours(self, addresses: Sequence[list[list[str]]]) -> Neighbours:
        """Return the trainer ranks on engine ranks' GPUs, which are the addresses over NCCL."""
        return {
            (index, engine, position): self._rank_on[address]
            for index, of_set in enumerate(addresses)
            for engine, of_engine in enumerate(of_set)
            for position, address in enumerate(of_engine)
            if address in self._rank_on
        }

    def _prepare(
        self,
        new: _Set,
        needs: ReceiverLayout,
        position: int,
        of_position: Sequence[Entry],
        receivers: Sequence[ReceiverInfo],
        make: Callable[..., Sender],
        publishes: bool,
    ) -> None:
        """Create this rank's ends of the links to one position, and publish its plan."""
        listed: list[list[tuple[int, list[Delivery]]]] = [[] for _ in new.meetings]
        for entry in of_position:
            if not publishes and entry.sender != self.rank:
                continue
            parts, deliveries = _deliveries(needs, entry)
            listed[entry.engine].append((entry.sender, deliveries))
            if entry.sender == self.rank:
                meeting, receiver = new.meetings[entry.engine], receivers[entry.engine]
                end = make(meeting, self.rank, position, receiver)
                held = {part: self.slice_of(part.name, part.region) for part, _ in parts}
                slices = [(held[part], encoding) for part, encoding in parts]
                new.links.append(_Link(entry.engine, end, slices))
                end.plan(deliveries)
        if publishes:
            new.meetings[0].publish_plan(position, listed)

    def _connect(self, new: _Set) -> str:
        """Connect to a set, all links at once, and return the problem if there is one."""
        try:
            new.meetings[0].await_prepared()
            run_all([link.end.connect for link in new.links])
        except EXPECTED as error:
            text = f"{type(error).__name__}: {error}"
            _report(new.meetings[0], f"trainer rank {self.rank}: {text}")
            return text
        return ""


def run_all(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run each call in a thread of its own; return their results, or raise the first error when all
    have ended. A single call runs in this thread."""
    if len(calls) <= 1:
        return [call() for call in calls]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    use_device = partial(torch.cuda.set_device, device) if device is not None else None
    with ThreadPoolExecutor(len(calls), initializer=use_device) as threads:
        running = [threads.submit(call) for call in calls]
    return [call.result() for call in running]


def _report(meeting: Rendezvous, error: str, *members: int) -> Failure:
    """Publish a failure and return the set's first one; this one where the store is lost, too."""
    failure = Failure(error, list(members))
    try:
        return meeting.report(failure)
    except RuntimeError:
        return failure


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


def _count(tables: list[SlotTable]) -> ByteCount:
    """Return how a slice's bytes are counted, for a balance of engines and senders."""
    dtypes = {slot.dtype for table in tables for slot in table.slots}
    if STORED in dtypes:
        return fp8_bytes
    return plain_bytes("float32" if dtypes == {"float32"} else "bfloat16")


def _deliveries(
    needs: ReceiverLayout, entry: Entry
) -> tuple[list[tuple[Transfer, Encoding]], list[Delivery]]:
    """Return the deliveries of an entry in order of slots, with what each holds."""
    found = []
    for item, region, _ in entry.parts:
        dtype = item.rule.dtype
        part = Transfer(item.name, item.shape, region, entry.sender, entry.position, dtype)
        for delivery, encoding in needs.deliveries(entry.position, part):
            found.append((part, encoding, delivery))
    found.sort(key=lambda each: each[2].slot)
    return [each[:2] for each in found], [each[2] for each in found]
