"""Sends the weights of a trainer rank in a push, straight from the model's parameters: the regions
that the plan assigns to this rank (`matching.planned_links`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec
import torch
from torch.distributed import Store

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats.published_layout import has_power_of_two_scales
from megatron_r1.models.weights.layout import Shard
from megatron_r1.models.weights.table import WeightTable
from megatron_r1.push.control_messages import ConnectedSets, EngineSetFailure, SentWeights
from megatron_r1.push.link_planner import (
    ConnectedLink,
    EngineSetLinks,
    HeldPieces,
    LinkPlanner,
)
from megatron_r1.push.matching.layouts import EngineLayout, TrainerGrid
from megatron_r1.push.matching.tensors import pushed_tensors
from megatron_r1.push.parameter_regions import EncodedRegions
from megatron_r1.push.receivers import EngineSetReceivers, read_receivers
from megatron_r1.push.rendezvous import (
    ENGINE_SET_FAILURE_ERRORS,
    EngineSetFailedError,
    TableStore,
    TrainerRendezvous,
)
from megatron_r1.push.round_sender import RoundSender
from megatron_r1.push.transports.payloads import LinkPayload

T = TypeVar("T")


def run_in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run each call in a thread of its own; return their results, or raise the first error when all
    have ended. A single call runs in this thread."""
    if len(calls) <= 1:
        return [call() for call in calls]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    use_device = partial(torch.cuda.set_device, device) if device is not None else None
    with ThreadPoolExecutor(len(calls), initializer=use_device) as threads:
        futures = [threads.submit(call) for call in calls]
    return [call.result() for call in futures]


BroadcastFromRankZero = Callable[[bytes | None], bytes]
"""Broadcasts rank 0's bytes to all trainer ranks, which pass None, and returns them."""


class WeightSender:
    """Sends the weights of a trainer rank; every method is called on all trainer ranks.

    Args:
        hf_config: the model's `config.json`.
        grid: the layout of the trainer.
        pieces: this rank's parameters, by the HF tensor of which they hold a piece.
        store: the store in which trainer and engine ranks meet.
        broadcast: broadcasts rank 0's bytes (`BroadcastFromRankZero`); a single rank needs none.
        rank: the trainer rank.
        stages: the shards of the pipeline's virtual stages, default an even spread.
        drafts: whether engines draft with the MTP layers.
        gpus: the UUID of each rank's GPU, where engines may share it over NCCL.
        adapters: the weight table of the adapters, where these alone are pushed."""

    def __init__(
        self,
        hf_config: HFConfig,
        grid: TrainerGrid,
        pieces: HeldPieces,
        store: Store,
        broadcast: BroadcastFromRankZero = lambda value: value or b"",
        *,
        rank: int = 0,
        stages: list[list[Shard]] | None = None,
        drafts: bool = False,
        gpus: Sequence[str] = (),
        adapters: WeightTable | None = None,
    ):
        self.grid, self.rank = grid, rank
        self.store, self.broadcast = store, broadcast
        self._power_of_two_scales = has_power_of_two_scales(hf_config)
        self._tensors = pushed_tensors(hf_config, fp8=False, drafts=drafts, adapters=adapters)
        self._planner = LinkPlanner(
            hf_config, grid, pieces, rank=rank, stages=stages, gpus=gpus, weight_table=adapters
        )
        self._sets: dict[str, EngineSetLinks] = {}
        self._tables = TableStore(store)
        self._round_sender = RoundSender(store, rank, grid.world_size)

    def connect(
        self,
        sets: Sequence[tuple[str, int]],
        layout: EngineLayout,
        transport: str,
        timeout_seconds: float,
        push_timeout_seconds: float | None = None,
        closed_sets: Sequence[str] = (),
    ) -> ConnectedSets:
        """Agree with all engine ranks of these sets on the chunks of this rank, and connect.

        Args:
            sets: name, unique to every call, and number of engines of each set.
            layout: that of one engine.
            transport: a key of `base.transports.TRANSPORTS`.
            timeout_seconds: limit for connecting.
            push_timeout_seconds: limit for a push, default `timeout_seconds`.
            closed_sets: sets to disconnect."""
        for name in closed_sets:
            self.disconnect(name)
        rendezvous = {
            name: [
                TrainerRendezvous(
                    self.store,
                    name,
                    timeout_seconds,
                    push_timeout_seconds,
                    self._tables,
                    member=member,
                    num_members=num_engines,
                )
                for member in range(num_engines)
            ]
            for name, num_engines in sets
        }
        receivers = self._read_receivers(rendezvous, layout.num_ranks)
        created_links, problems = self._planner.create_links(
            rendezvous, receivers, layout, transport
        )
        self._sets |= created_links
        present_links = {
            name: created_links[name] for name in receivers.sets if name not in problems
        }
        for name, problem in problems.items():  # first, so that no other rank waits for this one
            rendezvous[name][0].report_error(f"trainer rank {self.rank}: {problem}")
        # Before any wait, which would block this rank's only client of the store.
        for engine_set_links in present_links.values():
            num_ranks = len(engine_set_links.rendezvous) * layout.num_ranks
            engine_set_links.rendezvous[0].publish_prepared(self.grid.world_size, num_ranks)
        problems |= self._connect_links(present_links)
        for name in problems:
            self.disconnect(name)
        connected_links = {
            name: present_links[name] for name in present_links.keys() - problems.keys()
        }
        return ConnectedSets(
            problems=receivers.problems | problems,
            num_links={
                name: len(engine_set_links.links)
                for name, engine_set_links in connected_links.items()
            },
            num_bytes={
                name: engine_set_links.num_bytes
                for name, engine_set_links in connected_links.items()
            },
        )

    def _connect_links(self, sets: Mapping[str, EngineSetLinks]) -> dict[str, str]:
        """Connect to all sets at once, and return the problems by set."""
        outcomes = run_in_threads(
            [partial(self._connect_set, engine_set_links) for engine_set_links in sets.values()]
        )
        problems = {name: text for name, text in zip(sets, outcomes, strict=True) if text}
        in_rounds = {
            name: engine_set_links.engine_set_rounds
            for name, engine_set_links in sets.items()
            if engine_set_links.engine_set_rounds is not None and name not in problems
        }
        for name, error in self._round_sender.connect(in_rounds).items():
            problems[name] = self._report_connect_error(sets[name], error)
        return problems

    def disconnect(self, name: str) -> None:
        """Close the links to a set of engines; an unknown name is ignored."""
        if name in self._sets:
            self._sets.pop(name).close()

    def send(
        self, push_number: int, sets: Sequence[str], closed_sets: Sequence[str] = ()
    ) -> SentWeights:
        """Send the present weights to these sets, over all links at once, as push `push_number` of
        each set. Rank 0 returns when the engines of each set have relayed all of the push. A set
        that fails does not stop the others.

        Args:
            push_number: which push of the run, from 1.
            sets: the sets to send to.
            closed_sets: sets to disconnect."""
        for name in closed_sets:
            self.disconnect(name)
        present_links = {name: self._sets[name] for name in sets if name in self._sets}
        for engine_set_links in present_links.values():
            engine_set_links.push_number_in_set += 1
            if self.rank == 0:
                engine_set_links.rendezvous[0].publish_push_begun(
                    engine_set_links.push_number_in_set, push_number
                )
        failures = self._send_in_rounds(push_number, present_links) | self._send_over_links(
            push_number, present_links
        )
        for name, engine_set_links in present_links.items():
            if self.rank == 0 and len(engine_set_links.rendezvous) > 1 and name not in failures:
                rendezvous = engine_set_links.rendezvous[0]
                try:
                    rendezvous.wait_complete(push_number)
                except EngineSetFailedError as error:
                    failures[name] = error.failure
                except RuntimeError as error:
                    failure_text = f"an engine has not relayed all of push {push_number}: {error}"
                    failures[name] = rendezvous.report_error(failure_text)
        return SentWeights(failures)

    def _send_over_links(
        self, push_number: int, sets: Mapping[str, EngineSetLinks]
    ) -> dict[str, EngineSetFailure]:
        """Send a push over all links at once, but those of sets that are sent to in rounds."""
        failures: dict[str, EngineSetFailure] = {}

        def send_over(name: str, link: ConnectedLink) -> None:
            try:
                link.sender.send(push_number, self._encoded_regions(link))
            except EngineSetFailedError as error:
                failures.setdefault(name, error.failure)
            except (OSError, RuntimeError) as error:
                receiver = f"rank {link.sender.engine_rank} of engine {link.member} of the set"
                text = f"trainer rank {self.rank} to {receiver}: {type(error).__name__}: {error}"
                failure = link.sender.rendezvous.report_error(text, link.member)
                failures.setdefault(name, failure)

        run_in_threads(
            [
                partial(send_over, name, link)
                for name, engine_set_links in sets.items()
                for link in engine_set_links.links
                if engine_set_links.engine_set_rounds is None
            ]
        )
        return failures

    def _encoded_regions(self, link: ConnectedLink) -> EncodedRegions:
        return EncodedRegions(link.regions, power_of_two=self._power_of_two_scales)

    def _send_in_rounds(
        self, push_number: int, sets: Mapping[str, EngineSetLinks]
    ) -> dict[str, EngineSetFailure]:
        """Send a push in the rounds that the plan has for it."""
        rounds_of_sets = {}
        for name, engine_set_links in sets.items():
            if engine_set_links.engine_set_rounds is not None:
                payloads = {
                    (link.member, link.sender.engine_rank): LinkPayload(
                        link.sender.table, link.sender.chunks, self._encoded_regions(link)
                    )
                    for link in engine_set_links.links
                }
                engine_set_links.engine_set_rounds.push_number_in_set = (
                    engine_set_links.push_number_in_set
                )
                rounds_of_sets[name] = engine_set_links.engine_set_rounds, payloads
        return self._round_sender.send(push_number, rounds_of_sets) if rounds_of_sets else {}

    def _read_receivers(
        self, rendezvous: dict[str, list[TrainerRendezvous]], ranks_per_engine: int
    ) -> EngineSetReceivers:
        """Return what the engine ranks receive, which rank 0 reads for all."""
        if self.rank:
            return msgspec.msgpack.decode(self.broadcast(None), type=EngineSetReceivers)
        by_set = [engine_set_links.sent_bytes for engine_set_links in self._sets.values()]
        sent_bytes = [sum(bytes_of_rank) for bytes_of_rank in zip(*by_set, strict=True)]
        tensor_names = [name for name, _ in self._tensors]
        receivers = read_receivers(rendezvous, ranks_per_engine, tensor_names, sent_bytes)
        self.broadcast(msgspec.msgpack.encode(receivers))
        return receivers

    def _connect_set(self, engine_set_links: EngineSetLinks) -> str:
        """Connect to a set, all links at once, and return the problem if there is one."""
        try:
            engine_set_links.rendezvous[0].wait_prepared()
            run_in_threads([link.sender.connect for link in engine_set_links.links])
        except ENGINE_SET_FAILURE_ERRORS as error:
            return self._report_connect_error(engine_set_links, error)
        return ""

    def _report_connect_error(self, engine_set_links: EngineSetLinks, error: Exception) -> str:
        """Report to a set that this rank cannot connect, and return why."""
        text = f"{type(error).__name__}: {error}"
        engine_set_links.rendezvous[0].report_error(f"trainer rank {self.rank}: {text}")
        return text
