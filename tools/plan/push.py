"""Bytes of one weight push, added up from the plan that the push itself follows (weights/push)."""

from __future__ import annotations

import json
from functools import lru_cache

from megatron_r1.reporting.wording import counted
from megatron_r1.rollout.parallelism import engine_layout as layout_of
from megatron_r1.weights.push import EngineLayout, Planner, TrainerGrid
from megatron_r1.weights.push.engine_layout import EngineNeeds
from megatron_r1.weights.push.traffic import fp8_bytes, plain_bytes, traffic
from tools.plan.job import Job
from tools.plan.quantity import Quantity, Section


def engine_layout(job: Job) -> EngineLayout:
    """The recipe's, or where it does not say (all of rollout.tensor, .data and .pipeline are 1) as
    vLLM serves such models: attention tensor-parallel as far as its heads and a node go and
    data-parallel beyond, routed experts spread over all GPUs of an engine."""
    recipes = layout_of(job.config)
    if recipes.ranks_per_engine > 1:
        return recipes
    largest = min(job.engine_gpus, job.hardware.gpus_per_node)
    tensor = max(size for size in range(1, largest + 1) if _shares(job, size))
    return EngineLayout(
        engines=job.config.rollout.engines,
        tensor=tensor,
        data=job.engine_gpus // tensor,
        expert_parallel=job.has_experts and job.engine_gpus > 1,
    )


def _shares(job: Job, tensor: int) -> bool:
    """Whether so many GPUs can share the attention of an engine's model, and make up the engine."""
    heads = job.hf["num_attention_heads"]
    groups = heads if job.latent_attention else job.hf.get("num_key_value_heads") or heads
    whole = groups % tensor == 0 or tensor % groups == 0
    return job.engine_gpus % tensor == 0 and heads % tensor == 0 and whole


def check_engines(job: Job) -> None:
    """Raise ValueError for engines that cannot be on these GPUs, or cannot share the model."""
    job.check_engines()
    engine_rank_bytes(job)


def engine_rank_bytes(job: Job) -> int:
    """Weights of the first GPU of an engine, in the engines' dtype."""
    return _rank_bytes(json.dumps(job.hf), engine_layout(job), job.config.rollout.dtype)


@lru_cache
def _rank_bytes(hf: str, layout: EngineLayout, dtype: str) -> int:
    num_bytes = plain_bytes(dtype)
    needed = EngineNeeds(json.loads(hf), layout).needed(layout.place(0))
    return sum(num_bytes(t.name, t.rule.dtype, region) for t, region in needed)


def push_section(job: Job) -> Section:
    """What one push moves, and how evenly."""
    parallel, engines, dtype = job.parallel, engine_layout(job), job.config.rollout.dtype
    grid = TrainerGrid.of(parallel, job.world_size)
    planner = Planner(job.hf, grid, engines, job.stages)
    moved, half = (traffic(planner, count) for count in (plain_bytes(dtype), fp8_bytes))
    link = job.hardware.network * job.assumptions.link_efficiency
    into, out = moved.received.max(), moved.sent.max()
    return {
        "into an engine GPU": Quantity(
            into,
            "B",
            f"its part of every tensor, once, in {dtype}; {into / link:.2g} s through its network "
            f"adapter",
        ),
        "into all engines": Quantity(
            moved.received.sum(),
            "B",
            f"{counted(engines.num_ranks, 'GPU')}, each what it needs and no more",
        ),
        "out of a trainer rank": Quantity(
            out,
            "B",
            f"the busiest, {moved.busiest_sender:.2f} x the average of {grid.world}; replicas take "
            "turns",
        ),
        "in FP8": Quantity(
            half.received.max(),
            "B",
            "into an engine GPU with projections quantised on the way, 1 B + 4 B / 128 x 128",
        ),
    }
