"""Counts the connections of a push in sets of engines, and their time, over the plan that a run
executes (`push/plan/engine_sets.py`), and over NCCL in its rounds (`push/plan/rounds.py`)."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from megatron_r1.config.hardware import Assumptions
from megatron_r1.models.weights.layout import Shard
from megatron_r1.push.plan import EngineLayout, Planner, TrainerGrid
from megatron_r1.push.plan.engine_sets import Plan, engine_sets, entries
from megatron_r1.push.plan.predicted_layout import PredictedLayout
from megatron_r1.push.plan.rounds import PushOrder
from megatron_r1.push.plan.tensors import CountBytes
from megatron_r1.push.transports import PASSED_BYTES

PAIR_REQUESTS = 4
"""Requests to the store for a group of two: each rank sets its address and gets the other's."""
SLOT_BYTES = 90
"""Bytes of a tensor in a published table; 75 to 90 in the tables of DeepSeek-V3."""


@dataclass(frozen=True)
class SetTraffic:
    """The links of a push in sets, and the bytes on them.

    sent: bytes out of each trainer rank. out, into: most links of a trainer rank, of an engine
    rank. num_links: of all. num_engines: of the largest set. entering: most bytes that enter an
    engine rank from trainer ranks. received: bytes of each rank of an engine, with those that other
    engines pass on."""

    sent: list[float]
    out: int
    into: int
    num_links: int
    num_sets: int
    num_engines: int
    entering: float
    received: list[float]

    @property
    def busiest_sender(self) -> float:
        """The busiest trainer rank's bytes over the average of all trainer ranks."""
        return max(self.sent) / (sum(self.sent) / len(self.sent))

    def seconds(self, rate: float, given: Assumptions) -> float:
        """Return the time of a push through adapters of `rate`: what enters, from the busiest
        trainer rank, then rounds of what is passed on, in rings."""
        passed_on = max(self.received) - self.entering
        rounds = -(-passed_on // (PASSED_BYTES * self.num_engines))
        hops = (self.num_engines - 1) * given.hop_seconds
        return (
            max(max(self.sent), self.entering) / rate
            + passed_on / rate
            + rounds * (given.round_seconds + hops)
        )

    def requests(self, engines: EngineLayout, world: int, *, over_nccl: bool) -> int:
        """Return the requests to the store when all engines connect (`rendezvous`).

        An engine rank looks for its table, offers it, waits until all is ready, and reads its
        position's plan; over NCCL it reads its rounds, too, and otherwise creates its group.
        Trainer rank 0 reads every offer, and each table once; a trainer rank reports that it is
        prepared, and waits. Each position's table, and plan of a set, is written once."""
        ranks, positions = engines.num_ranks, engines.ranks_per_engine
        of_engines = ranks * (5 if over_nccl else 4 + 2 * (self.num_engines > 1)) + positions
        of_trainer = engines.engines + ranks + positions + 2 * world * self.num_sets
        plans = self.num_sets * (positions + 1)
        pairs = 0 if over_nccl else PAIR_REQUESTS * self.num_links
        return of_engines + of_trainer + plans + pairs

    def setup_seconds(
        self,
        engines: EngineLayout,
        world: int,
        num_slots: int,
        given: Assumptions,
        communicator: int = 0,
    ) -> float:
        """Return the time in which all ranks meet.

        num_slots: tensors in the tables of an engine's ranks, which rank 0 reads and broadcasts.
        communicator: the ranks of NCCL's largest communicator, or 0 over another transport."""
        tables = num_slots * SLOT_BYTES
        creating = given.group_seconds + communicator * given.group_rank_seconds
        return (
            self.requests(engines, world, over_nccl=bool(communicator)) / given.store_requests
            + 2 * tables / given.store_bytes
            + given.set_plan_seconds
            + (creating if communicator else 0)
        )


def round_seconds(order: PushOrder, rate: float, given: Assumptions) -> float:
    """Return the time of a push in rounds through adapters of `rate`, where each round takes as
    long as its largest bucket."""
    largest = order.largest_buckets()
    return float(np.sum(largest / rate + given.round_seconds))


def set_links(
    hf: dict,
    grid: TrainerGrid,
    engines: EngineLayout,
    stages: list[list[Shard]],
    count: CountBytes,
    max_engines: int,
    *,
    drafts: bool = False,
) -> SetTraffic:
    """Return the links of a push. max_engines: the most engines of a set. drafts: with the engines'
    drafters."""
    sets = engine_sets(engines.engines, max_engines)
    plans = set_plans(hf, grid, engines, stages, count, max_engines, drafts=drafts)
    out: Counter[int] = Counter()
    into: Counter[tuple[int, int, int]] = Counter()
    entering: Counter[tuple[int, int, int]] = Counter()
    sent, received = [0.0] * grid.world, [0.0] * engines.ranks_per_engine
    for index, plan in enumerate(plans):
        for entry in chain.from_iterable(plan):
            engine_rank = index, entry.member, entry.position
            out[entry.sender] += 1
            sent[entry.sender] += entry.num_bytes
            into[engine_rank] += 1
            entering[engine_rank] += entry.num_bytes
            received[entry.position] += entry.num_bytes / len(sets)
    return SetTraffic(
        sent=sent,
        out=max(out.values()),
        into=max(into.values()),
        num_links=out.total(),
        num_sets=len(sets),
        num_engines=max(map(len, sets)),
        entering=max(entering.values()),
        received=received,
    )


def set_plans(
    hf: dict,
    grid: TrainerGrid,
    engines: EngineLayout,
    stages: list[list[Shard]],
    count: CountBytes,
    max_engines: int,
    *,
    drafts: bool = False,
) -> list[Plan]:
    """Return the plan of each set."""
    chunks = tuple(map(tuple, stages))
    return _set_plans(json.dumps(hf), grid, engines, chunks, count, max_engines, drafts)


@lru_cache(maxsize=8)
def _set_plans(
    hf: str,
    grid: TrainerGrid,
    engines: EngineLayout,
    stages: tuple[tuple[Shard, ...], ...],
    count: CountBytes,
    max_engines: int,
    drafts: bool,
) -> list[Plan]:
    needs = PredictedLayout(json.loads(hf), engines, drafts=drafts)
    planner = Planner(json.loads(hf), grid, engines, stages, needs)
    return entries(planner, count, engine_sets(engines.engines, max_engines))
