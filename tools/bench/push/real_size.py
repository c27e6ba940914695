"""DeepSeek-V3 from 2,048 training ranks to 64 engines of 16 GPUs, on paper: the plan that a push
follows, added up."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_r1.weights.layout import stage_shards
from megatron_r1.weights.push import EngineLayout, Planner, TrainerGrid
from megatron_r1.weights.push.engine_layout import EngineNeeds
from megatron_r1.weights.push.traffic import fp8_bytes, plain_bytes, traffic

MODEL = Path(__file__).parents[3] / "examples/deepseek_r1/model/config.json"
GRID = TrainerGrid(2048, pipeline=16, expert=64)
ENGINES = EngineLayout(64, tensor=8, data=2, expert_parallel=True)
STAGES = "Etttt|" + "tttt|" * 14 + "tL"
ADAPTER = 400e9 / 8
"""Bytes a second into or out of one GPU."""


def plan_of_671b() -> dict[str, dict[str, float | str]]:
    hf = json.loads(MODEL.read_text(encoding="utf-8"))
    planner = _planner(hf)
    found: dict[str, dict[str, float | str]] = {"plan": _seconds(hf)}
    needs = EngineNeeds(hf, ENGINES)
    for name, num_bytes in (("bf16", plain_bytes("bfloat16")), ("fp8", fp8_bytes)):
        moved = traffic(planner, num_bytes)
        one_engine = sum(
            num_bytes(tensor.name, tensor.rule.dtype, region)
            for rank in range(ENGINES.ranks_per_engine)
            for tensor, region in needs.needed(ENGINES.place(rank))
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


def _planner(hf: dict) -> Planner:
    stages = stage_shards(hf, GRID.pipeline, pipeline_layout=STAGES, with_mtp=False)
    return Planner(hf, GRID, ENGINES, stages)


def _seconds(hf: dict) -> dict[str, float]:
    """To plan for one rank, from nothing; the slowest of a few of every kind."""
    senders = []
    for rank in (0, 1, 64, 1000, 1984, 2047):
        start = time.perf_counter()
        for _ in _planner(hf).sends(rank):
            pass
        senders.append(time.perf_counter() - start)
    receivers = []
    for rank in (0, 7, 8, 15, 1023):
        start = time.perf_counter()
        for _ in _planner(hf).receives(rank):
            pass
        receivers.append(time.perf_counter() - start)
    return {
        "seconds of a training rank": max(senders),
        "seconds of an engine rank": max(receivers),
    }
