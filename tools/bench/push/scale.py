"""A push over NCCL at its real size: its planned order of rounds (`push/matching/rounds.py`) is
checked, and executed by a model of stream queues, which also gives its time.

A process sends to one other and receives from one at any time, so that links are never shared.

`PushAssumptions` has the rates and latencies that it assumes, each with its reason."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from megatron_r1.base.transports import RELAY_BUCKET_BYTES
from megatron_r1.config import load_recipe
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.layout import recipe_stages, stage_shards
from megatron_r1.plan import hardware
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.hardware import ByteRate, Count
from megatron_r1.push.matching import EngineLayout, MatchedRegions, TrainerGrid
from megatron_r1.push.matching.planned_links import (
    MAX_SET_ENGINES,
    engine_sets,
    needed_regions,
    plan_sets,
    total_bytes,
)
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.recipe_plan import engine_layout
from megatron_r1.push.matching.rounds import RoundSchedule, planned_schedule
from megatron_r1.push.matching.tensors import fp8_bytes, plain_bytes
from tools.bench.host import ROOT
from tools.bench.push.schedule_check import find_fault
from tools.bench.push.stream_operations import (
    link_threads,
    operations_of_rounds,
    operations_of_steps,
)
from tools.bench.push.stream_queues import StreamQueues

PLAN = Assumptions()
"""The assumptions of `megatron-r1 plan`."""


@checked_dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True))
class PushAssumptions:
    nic: ByteRate = 50e9
    """one 400 Gb/s adapter per GPU, in each direction"""
    nic_efficiency: Annotated[float, ""] = 0.885
    """44.26 GB/s per GPU over 400 Gb/s while 64 GPUs push to 32 (prime-rl#3341)"""
    nvlink: ByteRate = 200e9
    """H800, in each direction (arXiv 2412.19437, 3.1)"""
    nvlink_efficiency: Annotated[float, ""] = PLAN.link_efficiency
    """as megatron-r1 plan (link_efficiency)"""
    device_pack: ByteRate = 90e9
    """conversion, copy and `weighted_sum` touch 22 B of HBM per byte, at 0.6 of 3.35 TB/s"""
    message_seconds: Annotated[float, "s"] = 30e-6
    """launch and handshake of a group of a send and a receive"""
    round_seconds: Annotated[float, "s"] = PLAN.round_seconds
    """launch of an all-gather"""
    hop_seconds: Annotated[float, "s"] = PLAN.hop_seconds
    """per hop of a ring: 10 us, and 0.5 MB of filling at the adapter's rate"""
    gpus_per_node: Count = 8
    """as in all recipes"""


def as_table(assumptions: PushAssumptions) -> list[dict[str, object]]:
    """Return a row for each assumption: its name, value, unit and reason."""
    return [
        {
            "name": name,
            "value": getattr(assumptions, name),
            "unit": hardware.unit_of(info),
            "reason": info.description or "",
        }
        for name, info in hardware.described_fields(assumptions).items()
    ]


FORMS = {"bf16": plain_bytes("bfloat16"), "FP8": fp8_bytes}
LARGEST_BUFFER = 4
"""Sends that NCCL may buffer of a pair: the model tries 0 to this."""
FIGURE_LIMITS = {
    "over the floor": (1.2, "{:.3g} x the floor"),
    "processes that stick": (0, "{} processes stick"),
    "links out of a rank": (32, "{} links out of a trainer rank"),
    "links into a rank": (32, "{} links into an engine rank"),
}
"""The aims of a push at this size: the most of each figure, and its name in a sentence."""


@dataclasses.dataclass(frozen=True)
class ScaleCase:
    """A push from the trainer ranks of `region_matches` to its engines.

    Attributes:
        name: how the table names it.
        region_matches: what each trainer rank may send to which engine rank.
        colocated: on the trainer ranks' GPUs.
        form: a dtype, or "FP8".
        seeds: runs of the model."""

    name: str
    region_matches: MatchedRegions
    colocated: bool
    form: str = "bf16"
    seeds: int = 5


def simulate() -> dict[str, Any]:
    """Return, and print, what the checker and the model say to all cases."""
    start = time.process_time()
    rows = []
    for case in _scale_cases():
        row = simulate_case(case, PushAssumptions())
        rows.append(row)
        print(
            f"{row['case']}, {row['weights']}: {row['processes']:,} processes, "
            f"{row['buckets that enter']:,} buckets enter in {row['rounds of entry']} rounds "
            f"(floor {row['floor of rounds']}) and are passed on in {row['rounds of passing on']}; "
            f"{row['seconds']:.3f} s, {row['over the floor']:.3f} x floor {row['floor']:.3f} s; "
            f"{row['circle'] or 'no circle'}, {row['processes that stick']} stick in "
            f"{row['runs']} runs",
            flush=True,
        )
        print("".join(f"    {sentence}\n" for sentence in missed_aims(row)), end="", flush=True)
    flagship = ScaleCase(
        "", _match_regions_of_recipe("examples/deepseek_r1/r1_zero.yaml"), colocated=False
    )
    planted = without_order(flagship)
    print("r1_zero in pools, a thread for each link instead of rounds:", planted)
    return {
        "assumptions": as_table(PushAssumptions()),
        "cases": rows,
        "a thread for each link": planted,
        "seconds of one core": time.process_time() - start,
    }


def missed_aims(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each figure of a simulated push that is beyond its aim."""
    return [
        f"{text.format(row[name])}, at most {limit:g} wanted"
        for name, (limit, text) in FIGURE_LIMITS.items()
        if row[name] > limit
    ]


def simulate_case(case: ScaleCase, rates: PushAssumptions) -> dict[str, Any]:
    """Return the figures of a case."""
    began = time.process_time()
    order = _plan_schedule(case)
    planning = time.process_time() - began
    operations = operations_of_rounds(order)
    seconds = transfer_seconds(order, operations, rates)
    enters = operations["bucket"] < order.num_scatter_buckets  # first in every stream
    entry = StreamQueues(operations[enters], seconds[enters]).run()
    queues = StreamQueues(operations, seconds)
    runs = [queues.run(seed, seed % (LARGEST_BUFFER + 1)) for seed in range(case.seeds)]
    refusal = find_fault(operations, order)
    together = [order.scatter_bytes[list(members)].sum() for members in order.relay_groups]
    floor = max(order.scatter_bytes.max(), *together, 0) / rates.nic
    sides = np.array(order.links)[:, :2].T
    return {
        "case": case.name,
        "weights": case.form,
        "processes": order.num_processes,
        "links": len(order.links),
        "buckets that enter": order.num_scatter_buckets,
        "rounds of entry": order.num_scatter_rounds,
        "floor of rounds": order.min_scatter_rounds,
        "rounds of passing on": order.num_relay_rounds,
        "seconds": runs[0].seconds,
        "seconds of entry": entry.seconds,
        "seconds of passing on by all-gathers": _gather_seconds(order, rates),
        "floor": floor,
        "over the floor": runs[0].seconds / floor,
        "links out of a rank": int(np.bincount(sides[0]).max()),
        "links into a rank": int(np.bincount(sides[1]).max()),
        "peers of a process": _most_peers(operations),
        "circle": str(refusal) if refusal is not None else None,
        "runs": len(runs),
        "processes that stick": sum(run.num_stuck for run in runs),
        "held on its own GPU": _held_on_own_gpu(case) if case.colocated else None,
        "CPU seconds of planning": planning,
    }


def without_order(case: ScaleCase) -> dict[str, Any]:
    """Return what model and checker say to `link_threads`, a push without a common order."""
    order, stuck, refusal = _plan_schedule(case), [], None
    for buffered in range(LARGEST_BUFFER + 1):
        operations = operations_of_steps(link_threads(order, buffered, interleaved=4))
        stuck.append(StreamQueues(operations).run(buffered, buffered).num_stuck)
        refusal = refusal or find_fault(operations, order)
    return {
        "processes": order.num_processes,
        "processes that stick with 0 to 4 buffered buckets": stuck,
        "circle": str(refusal) if refusal is not None else None,
    }


def _scale_cases() -> Iterator[ScaleCase]:
    flagship = _match_regions_of_recipe("examples/deepseek_r1/r1_zero.yaml")
    on_policy = _match_regions_of_recipe("examples/distill/qwen2.5-math-7b_on_policy.yaml")
    yield ScaleCase("r1_zero", flagship, colocated=True, seeds=100)
    yield ScaleCase("r1_zero", flagship, colocated=True, form="FP8")
    yield ScaleCase("r1_zero in pools", flagship, colocated=False)
    yield ScaleCase(
        "qwen2.5-32b_rl", _match_regions_of_recipe("examples/distill/qwen2.5-32b_rl.yaml"), True
    )
    yield ScaleCase("qwen2.5-math-7b_on_policy", on_policy, colocated=True)
    many = _match_regions_of_many_engines()
    for form in FORMS:
        yield ScaleCase("64 engines x 16 GPUs, of their own", many, colocated=False, form=form)


def _match_regions_of_recipe(recipe: str) -> MatchedRegions:
    """Return the matched regions of a shipped recipe."""
    config = load_recipe(ROOT / recipe)
    hf_config, layout = read_hf_config(config.model.path), engine_layout(config)
    grid = TrainerGrid.from_recipe(config.parallel, config.parallel.processes)
    needs = PredictedSharding(hf_config, layout, drafts=config.rollout.drafts_by_mtp)
    return MatchedRegions(hf_config, grid, layout, recipe_stages(config, hf_config), needs)


def _match_regions_of_many_engines() -> MatchedRegions:
    """Return those of DeepSeek-V3 from 2,048 trainer ranks to 64 engines of 16 GPUs."""
    hf_config = read_hf_config(ROOT / "examples/deepseek_r1/model")
    grid = TrainerGrid(2048, pipeline=16)
    layout = "Etttt|" + "tttt|" * 14 + "tL"
    stages = stage_shards(hf_config, grid.pipeline, pipeline_layout=layout, with_mtp=False)
    engines = EngineLayout(64, tensor_parallel=8, data_parallel=2, expert_parallel=True)
    return MatchedRegions(hf_config, dataclasses.replace(grid, expert=64), engines, stages)


def _plan_schedule(case: ScaleCase) -> RoundSchedule:
    region_matches, layout = case.region_matches, case.region_matches.layout
    sets = engine_sets(layout.engines, MAX_SET_ENGINES)
    plans = plan_sets(region_matches, FORMS[case.form], sets)
    ranks, world_size = layout.ranks_per_engine, region_matches.grid.world_size
    return planned_schedule(plans, sets, ranks, world_size, colocated=case.colocated)


def _held_on_own_gpu(case: ScaleCase) -> float:
    """Return the part of all engine ranks' bytes that the trainer rank on the same GPU holds, which
    a plan could copy there instead of sending it."""
    layout, held_bytes, needed_bytes = case.region_matches.layout, 0, 0
    for position, regions in enumerate(needed_regions(case.region_matches, FORMS[case.form])):
        ranks = range(position, layout.num_ranks, layout.ranks_per_engine)
        for replicas, held_regions in regions.items():
            num_bytes = total_bytes(held_regions)
            held_bytes += num_bytes * len(set(ranks) & set(replicas))
            needed_bytes += num_bytes * len(ranks)
    return held_bytes / needed_bytes


def transfer_seconds(
    order: RoundSchedule, operations: np.ndarray, rates: PushAssumptions
) -> np.ndarray:
    """Return how long each send or receive takes once both sides have come to it. Processes are
    numbered by GPU.

    Args:
        order: the planned rounds.
        operations: the sends and receives, as `OPERATION`.
        rates: the assumed rates of the links."""
    sides = operations["process"], operations["peer"]
    is_near = np.equal(*(side // rates.gpus_per_node for side in sides))
    intranode_rate = min(rates.nvlink * rates.nvlink_efficiency, rates.device_pack)
    internode_rate = min(rates.nic * rates.nic_efficiency, rates.device_pack)
    rate = np.where(is_near, intranode_rate, internode_rate)
    return rates.message_seconds + order.num_bytes[operations["bucket"]] / rate


def _gather_seconds(order: RoundSchedule, rates: PushAssumptions) -> float:
    """Return how long relaying would take by all-gathers in rings over the adapters, padded to
    the largest share."""
    seconds = []
    for members in map(list, order.relay_groups):
        share, hops = int(order.scatter_bytes[members].max()), len(members) - 1
        rounds = -(-share // RELAY_BUCKET_BYTES)
        latency = rounds * (rates.round_seconds + hops * rates.hop_seconds)
        seconds.append(hops * share / (rates.nic * rates.nic_efficiency) + latency)
    return max(seconds, default=0.0)


def _most_peers(operations: np.ndarray) -> int:
    """Return the most processes that one process is connected to."""
    pairs = np.unique(operations[["process", "peer"]])
    return int(np.bincount(pairs["process"]).max())
