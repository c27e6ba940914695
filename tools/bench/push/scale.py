"""A push of DeepSeek-V3 from 2,048 trainer ranks, simulated: every rank sends to every engine, or
every slice enters one engine and the engines exchange them.

Both come from the project's own plans (`weight_sync/plan`), byte by byte."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_r1.config import load
from megatron_r1.models import read_hf_config
from megatron_r1.weight_sync.plan import EngineLayout, Planner, TrainerGrid
from megatron_r1.weight_sync.plan.engine_sets import engine_sets
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.recipe import engine_layout, planned_entries
from megatron_r1.weight_sync.plan.tensors import CountBytes, fp8_bytes, plain_bytes
from megatron_r1.weights.layout import Shard, recipe_stages
from tools.bench.children import ROOT
from tools.bench.push import real_size
from tools.bench.push.assumptions import PushAssumptions, as_table
from tools.bench.push.designs import Cluster, direct_tasks, entered_ranks, entry_tasks
from tools.bench.push.direct_links import direct_links
from tools.plan.push_sets import PAIR_REQUESTS, set_links

RECIPE = ROOT / "examples/deepseek_r1/r1_zero.yaml"
FORMS: dict[str, CountBytes] = {"bf16": plain_bytes("bfloat16"), "FP8": fp8_bytes}
DIRECT_BATCH, ENTRY_BATCH = 0.3, 0.005
"""The share of running tasks that end between two computations of rates. 0.1 and 0.002 change the
makespans by less than 6% and 0.1%; with 0.02 an all-gather was slowed by what had entered already,
by up to 5%."""
MOST = {
    "over the floor": (1.2, "{:.3g} x the floor"),
    "links out of a rank": (32, "{} links out of a trainer rank"),
    "links into a rank": (32, "{} links into an engine rank"),
    "setup seconds": (10.0, "{:.3g} s of set-up"),
}
"""The aims of a push at this size: the most of each figure, and its name in a sentence."""


@dataclass(frozen=True)
class ScaleCase:
    name: str
    hf: dict
    stages: list[list[Shard]]
    planner: Planner
    cluster: Cluster
    drafts: bool = False

    @property
    def engines(self) -> EngineLayout:
        return self.planner.engines


def simulate() -> dict[str, Any]:
    """Return, and print, the simulated pushes of all cases, weights and designs."""
    start = time.process_time()
    found: dict[str, Any] = {"assumptions": as_table(PushAssumptions()), "cases": {}}
    for case in _cases():
        rows = [row for form, count in FORMS.items() for row in _rows(case, form, count)]
        found["cases"][case.name] = rows
        print(case.name)
        for row in rows:
            print(
                f"  {row['weights']:5} {row['design']:45} {row['seconds']:7.3f} s, "
                f"{row['over the floor']:6.2f} x floor {row['floor']:.3f} s; links "
                f"{row['links out of a rank']}/{row['links into a rank']}, groups "
                f"{row['groups of a rank']}, {row['store requests']:,.0f} requests, set up in "
                f"{row['setup seconds']:.1f} s",
                flush=True,
            )
            print("".join(f"        {sentence}\n" for sentence in beyond(row)), end="", flush=True)
    return {**found, "seconds of one core": time.process_time() - start}


def beyond(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each figure of a simulated push that is beyond its aim."""
    return [
        f"{text.format(row[name])}, at most {most:g} wanted"
        for name, (most, text) in MOST.items()
        if row[name] > most
    ]


def _cases() -> Iterator[ScaleCase]:
    config = load(RECIPE)
    hf = read_hf_config(config.model.path)
    grid = TrainerGrid.from_recipe(config.parallel, config.parallel.processes)
    engines = engine_layout(config)
    stages = recipe_stages(config, hf)
    drafts = config.rollout.drafts_by_mtp
    needs = PredictedLayout(hf, engines, drafts=drafts)
    planner = Planner(hf, grid, engines, stages, needs)
    cluster = Cluster(grid.world, engines.num_ranks, config.rollout.colocated)
    name = "the recipe's 16 engines x 128 GPUs, colocated"
    yield ScaleCase(name, hf, stages, planner, cluster, drafts)
    stages = real_size.stages(hf)
    planner = Planner(hf, real_size.GRID, real_size.ENGINES, stages)
    cluster = Cluster(real_size.GRID.world, real_size.ENGINES.num_ranks, colocated=False)
    yield ScaleCase("64 engines x 16 GPUs, of their own", hf, stages, planner, cluster)


def _rows(case: ScaleCase, form: str, count: CountBytes) -> Iterator[dict[str, Any]]:
    cluster, rates = case.cluster, case.cluster.rates
    direct = direct_links(case.planner, count)
    floor = direct.received.max() / rates.nic

    def row(
        design: str, seconds: float, links: np.ndarray, exchange: int, requests: float, setup: float
    ) -> dict:
        out, into = (np.bincount(side).max() for side in links.T)
        return {
            "weights": form,
            "design": design,
            "seconds": seconds,
            "floor": floor,
            "over the floor": seconds / floor,
            "links out of a rank": int(out),
            "links into a rank": int(into),
            "groups of a rank": int(max(out, into + bool(exchange))),
            "groups": len(links) + exchange,
            "store requests": requests,
            "setup seconds": setup,
        }

    if form == "bf16":  # the bytes of FP8 are half of it, and everything else is the same
        pairs = np.stack([direct.sender, direct.receiver], axis=1)
        requests, setup = _direct_setup(case, pairs)
        for design, rotated, capacity in (
            ("each engine in turn, packed on the host", False, cluster.with_host_packing()),
            ("each engine in turn", False, cluster.capacity),
            ("each engine in turn, each rank in another order", True, cluster.capacity),
        ):
            tasks = direct_tasks(cluster, case.planner, direct, rotated)
            ends = tasks.finish_times(capacity, DIRECT_BATCH)
            yield row(design, ends.max(), pairs, 0, requests, setup)
    began = time.process_time()
    sets = engine_sets(case.engines.engines)
    entered = planned_entries(case.planner, count, sets, shares_gpus=cluster.colocated)
    plans = list(zip(sets, entered, strict=True))
    planning = time.process_time() - began
    per_engine = case.engines.ranks_per_engine
    pairs = np.array([(entry.sender, rank) for entry, rank in entered_ranks(plans, per_engine)])
    ends = entry_tasks(cluster, plans, per_engine).finish_times(cluster.capacity, ENTRY_BATCH)
    exchange = len(sets) * per_engine
    links = set_links(
        *(case.hf, case.planner.grid, case.engines, case.stages, count, len(sets[0])),
        drafts=case.drafts,
        shares_gpus=cluster.colocated,
    )
    requests, size = links.requests(case.engines, case.planner.grid.world), _table_bytes(case)
    setup = _setup_seconds(rates, requests, size, size, [2, len(sets[0])], planning)
    yield row("enters one engine, exchanged", ends.max(), pairs, exchange, requests, setup)


def _direct_setup(case: ScaleCase, pairs: np.ndarray) -> tuple[float, float]:
    """Return the requests to the store, and the seconds: each trainer rank reads the offers of all
    engine ranks and the table of each position; per link a plan is published, listed and read, and
    a group formed, one after another."""
    world, engines = case.planner.grid.world, case.engines
    requests = world * (engines.num_ranks + engines.ranks_per_engine + engines.engines)
    requests += 5 * engines.num_ranks + len(pairs) * (3 + PAIR_REQUESTS)
    most = int(np.bincount(pairs[:, 0]).max())
    rates, num_bytes = case.cluster.rates, world * _table_bytes(case)
    return requests, _setup_seconds(rates, requests, num_bytes, 0, [2] * most, 1.0)


def _setup_seconds(
    rates: PushAssumptions,
    requests: float,
    store_bytes: float,
    broadcast_bytes: float,
    group_sizes: list[int],
    planning: float,
) -> float:
    """Return the seconds of connecting all ranks, once.

    requests, store_bytes: to and out of the store; group_sizes: of the groups that a rank creates
    one after another; planning: seconds."""
    creating = sum(rates.group_seconds + size * rates.group_rank_seconds for size in group_sizes)
    return (
        requests / rates.store_requests
        + store_bytes / rates.store_bytes
        + broadcast_bytes / rates.broadcast
        + planning
        + creating
    )


def _table_bytes(case: ScaleCase) -> int:
    return sum(map(len, real_size.tables(case.hf, replace(case.engines, engines=1))))
