"""A trainer rank's part in pushing weights: it brings every engine rank the slices that are its to
bring, straight from where they lie in the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import Store

from megatron_r1.weight_sync.plan.engine_layout import EngineLayout
from megatron_r1.weight_sync.plan.plan import Planner
from megatron_r1.weight_sync.plan.receiver_layout import ReceiverLayout
from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.plan.trainer_grid import TrainerGrid
from megatron_r1.weight_sync.receive.rendezvous import Rendezvous, Tables
from megatron_r1.weight_sync.receive.table import Table
from megatron_r1.weight_sync.send.source import Form, Outgoing, Source
from megatron_r1.weight_sync.transports import Sender, sender_class
from megatron_r1.weights.layout import Shard
from megatron_r1.weights.rules import Piece

Held = Mapping[str, Sequence[tuple[Tensor, Piece]]]
"""HF name -> the parameters that hold pieces of it."""


@dataclass(frozen=True)
class _Link:
    """To one engine rank. sources[i] is what its i-th delivery is made from."""

    sender: Sender
    sources: list[tuple[Source, Form]]

    def send(self, push: int, window: int) -> None:
        if window < self.sender.table.num_windows:
            self.sender.send(push, window, Outgoing(self.sources))

    @property
    def num_bytes(self) -> int:
        return sum(d.num_bytes(self.sender.table) for d in self.sender.deliveries)


class WeightSender:
    """Rank `rank` of `grid`, which holds `held` of the model `hf` describes.

    stages: what the pipeline's virtual stages hold, default an even spread. store: where trainer
    and engine ranks meet. Every method is called on all ranks.
    """

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        held: Held,
        store: Store,
        *,
        rank: int = 0,
        stages: list[list[Shard]] | None = None,
    ):
        self.hf, self.grid, self.held, self.stages = hf, grid, held, stages
        self.store, self.rank = store, rank
        self._links: dict[int, list[_Link]] = {}
        self._tables = Tables(store)
        self._needs: tuple[EngineLayout, list[Table], ReceiverLayout] | None = None

    def connect(
        self,
        engine: int,
        name: str,
        layout: dict[str, Any],
        transport: str,
        timeout_seconds: float,
        full_every: int = 1,
        push_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Agree with all ranks of an engine on what this rank brings them.

        engine: its index; which of the ranks that hold the same brings it follows from that. name:
        of this start of it. layout: `EngineLayout`'s fields, of one engine. full_every: pushes, of
        which the first is sent whole, and of the others what changed. push_seconds: that a push
        may take, default as connecting. Returns "problem", or
        num_windows and the bytes that this rank sends with every push.
        """
        self.disconnect(engine)
        meeting = Rendezvous(self.store, name, timeout_seconds, push_seconds, self._tables)
        try:
            self._links[engine] = self._agree(
                meeting, engine, EngineLayout(**layout), transport, full_every
            )
        except (OSError, RuntimeError, ValueError) as error:  # torch.distributed's are the second
            return {"problem": f"{type(error).__name__}: {error}"}
        links = self._links[engine]
        return {
            "num_windows": max((link.sender.table.num_windows for link in links), default=1),
            "num_bytes": sum(link.num_bytes for link in links),
        }

    def disconnect(self, engine: int) -> None:
        for link in self._links.pop(engine, []):
            link.sender.close()

    def send(self, push: int, engines: Sequence[int], gone: Sequence[int] = ()) -> dict[str, Any]:
        """Bring the present weights to these engines, as push number `push` of each. gone: engines
        that get no more.

        Returns "problems" by engine: an engine that is lost on the way does not stop the others."""
        for engine in gone:
            self.disconnect(engine)
        problems: dict[str, str] = {}
        links = {engine: self._links.get(engine, []) for engine in engines}
        tables = [link.sender.table for found in links.values() for link in found]
        for window in range(max((table.num_windows for table in tables), default=0)):
            for engine, found in links.items():
                try:
                    for link in found if str(engine) not in problems else []:
                        link.send(push, window)
                except (OSError, RuntimeError) as error:  # torch.distributed's are the latter
                    problems[str(engine)] = f"{type(error).__name__}: {error}"
        return {"problems": problems}

    def _agree(
        self,
        meeting: Rendezvous,
        engine: int,
        layout: EngineLayout,
        transport: str,
        full_every: int,
    ) -> list[_Link]:
        offers = meeting.offers(layout.num_ranks)
        needs = self._needs_of(layout, [offer.table for offer in offers])
        planner = Planner(self.hf, self.grid, layout, self.stages, needs)
        deliveries = defaultdict(list)
        for transfer in planner.sends(self.rank, engine):
            rank = transfer.receiver % layout.ranks_per_engine
            source = self._source(transfer.name, transfer.region)
            for delivery, form in needs.deliveries(rank, transfer):
                deliveries[rank].append((delivery, (source, form)))
        links, plans = [], {}
        try:
            for rank, found in deliveries.items():
                found.sort(key=lambda item: item[0].slot)
                sender = sender_class(transport)(meeting, self.rank, rank, offers[rank], full_every)
                links.append(_Link(sender, [source for _, source in found]))
                plans[rank] = sender.plan([delivery for delivery, _ in found])
            meeting.plan(self.rank, self.grid.world, plans, layout.num_ranks)
            for link in links:
                link.sender.connect()
        except BaseException:
            for link in links:
                link.sender.close()
            raise
        return links

    def _needs_of(self, layout: EngineLayout, tables: list[Table]) -> ReceiverLayout:
        """Engines that are alike have the very same tables; most of the work is to read them."""
        if self._needs is None or self._needs[:2] != (layout, tables):
            self._needs = layout, tables, ReceiverLayout(self.hf, layout, tables)
        return self._needs[2]

    def _source(self, name: str, region: Region) -> Source:
        for parameter, piece in self.held.get(name, ()):
            source = Source(parameter, piece, region)
            if source.is_here:
                return source
        raise ValueError(f"this rank does not hold {region} of {name}")
