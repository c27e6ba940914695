"""The push of DeepSeek-V3 from 2,048 training ranks to 64 engines of 16 GPUs, computed from the
plan of a push without sets, as with a single engine."""

import json
import time
from dataclasses import replace

import msgspec

from megatron_r1.weight_sync.plan import EngineLayout, Planner, TrainerGrid
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.ranks import Coordinate
from megatron_r1.weight_sync.plan.receiver_layout import ReceiverLayout
from megatron_r1.weight_sync.plan.tensors import fp8_bytes, plain_bytes
from megatron_r1.weight_sync.table import Slot, SlotTable
from megatron_r1.weights.layout import Shard, stage_shards
from tools.bench.children import ROOT
from tools.bench.push.direct_links import direct_links, sends

MODEL = ROOT / "examples/deepseek_r1/model/config.json"
GRID = TrainerGrid(2048, pipeline=16, expert=64)
ENGINES = EngineLayout(64, tensor=8, data=2, expert_parallel=True)
ONE = replace(ENGINES, engines=1)
STAGES = "Etttt|" + "tttt|" * 14 + "tL"
ADAPTER = 400e9 / 8
"""Bytes per second into or out of one GPU."""


def plan_of_671b() -> dict[str, dict[str, float | str]]:
    """Return the planning time of a push at 671B, and the bytes that it moves, in bf16 and FP8."""
    hf = json.loads(MODEL.read_text(encoding="utf-8"))
    planner = Planner(hf, GRID, ENGINES, stages(hf))
    found: dict[str, dict[str, float | str]] = {"plan": _seconds(hf)}
    needs = PredictedLayout(hf, ENGINES)
    for name, num_bytes in (("bf16", plain_bytes("bfloat16")), ("fp8", fp8_bytes)):
        moved = direct_links(planner, num_bytes)
        one_engine = sum(
            num_bytes(tensor.name, tensor.rule.dtype, region)
            for rank in range(ENGINES.ranks_per_engine)
            for tensor, region in needs.needed(ENGINES.coordinate(rank))
        )
        found[name] = {
            "GB in all": moved.received.sum() / 1e9,
            "ratio to what the engines need": moved.received.sum() / (64 * one_engine),
            "GB into the busiest engine GPU": moved.received.max() / 1e9,
            "busiest engine GPU over the average": moved.received.max() / moved.received.mean(),
            "GB out of the busiest training rank": moved.sent.max() / 1e9,
            "busiest training rank over the average": moved.busiest_sender,
            "seconds at 400 Gb/s per GPU": max(moved.received.max(), moved.sent.max()) / ADAPTER,
            "formula": "max(bytes into a GPU, bytes out of a rank) / 50 GB/s",
        }
    return found


def stages(hf: dict) -> list[list[Shard]]:
    return stage_shards(hf, GRID.pipeline, pipeline_layout=STAGES, with_mtp=False)


def _seconds(hf: dict) -> dict[str, float | str]:
    """Return the seconds to plan for one rank from scratch; the slowest of a few of each kind."""
    encoded = tables(hf, ONE)
    senders = [_sender_seconds(hf, rank, encoded) for rank in (0, 1, 64, 1000, 1984, 2047)]
    return {
        "seconds of a training rank, to all engines": max(senders),
        "GB of tables into all training ranks": GRID.world * sum(map(len, encoded)) / 1e9,
    }


def tables(hf: dict, engine: EngineLayout) -> list[bytes]:
    """Return the table that each rank of an engine publishes."""
    needs = PredictedLayout(hf, engine)
    return [
        msgspec.msgpack.encode(slot_table(needs, engine.coordinate(rank)))
        for rank in range(engine.ranks_per_engine)
    ]


def slot_table(needs: PredictedLayout, coordinate: Coordinate) -> SlotTable:
    """Return the table of an engine rank's tensors in bfloat16, one after another."""
    slots, end = [], 0
    for tensor, at in needs.needed(coordinate):
        pitch = 2 * (at.right - at.left)
        corners = at.top, at.bottom, at.left, at.right
        slots.append(Slot(tensor.name, *corners, end, pitch, "bfloat16"))
        end += pitch * (at.bottom - at.top)
    return SlotTable(end, slots)


def _sender_seconds(hf: dict, rank: int, encoded: list[bytes]) -> float:
    """Plan as a sending rank does when it connects to one engine after another."""
    start = time.perf_counter()
    decoded = [msgspec.msgpack.decode(table, type=SlotTable) for table in encoded]
    needs, of_stages = ReceiverLayout(hf, ONE, decoded), stages(hf)
    for engine in range(ENGINES.engines):
        for one in sends(Planner(hf, GRID, ONE, of_stages, needs), rank, engine):
            at = one.receiver % ONE.ranks_per_engine
            needs.deliveries(at, one.name, one.shape, one.region)
    return time.perf_counter() - start
