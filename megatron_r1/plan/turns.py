"""Seconds between the phases of a step: engines load pushed weights, sleep and wake, and the
trainer saves checkpoints."""

import json
from functools import lru_cache

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.memory import checkpoint_bytes
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push import drafts, planned_engine_layout, planned_rank_bytes
from megatron_r1.plan.quantity import Quantity, in_bytes
from megatron_r1.push.plan import EngineLayout
from megatron_r1.push.plan.planner import PredictedLayout


def load(job: PlannedJob) -> Quantity:
    """Return the seconds in which an engine GPU takes pushed weights out of its receive buffer."""
    given, weights = job.assumptions, planned_rank_bytes(job)
    layout = planned_engine_layout(job)
    tensors = _num_tensors(json.dumps(job.hf), layout, drafts(job))
    rate = job.hardware.memory_bandwidth * given.bandwidth_efficiency / 2  # read and written
    how = "read and written in the GPU's memory"
    if TRANSPORTS[job.config.push.transport].memory == "host":
        rate, how = job.hardware.host_link * given.link_efficiency, "through the host's link"
    return Quantity(
        weights / rate + tensors * given.tensor_load_seconds,
        "s",
        f"{in_bytes(weights)} {how}, and {tensors:,} tensors x {given.tensor_load_seconds:g} s",
    )


@lru_cache
def _num_tensors(hf: str, layout: EngineLayout, drafting: bool) -> int:
    """Return the tensors of an engine's first GPU."""
    needs = PredictedLayout(json.loads(hf), layout, drafts=drafting)
    return sum(1 for _ in needs.needed(layout.coordinate(0)))


def sleep_and_wake(job: PlannedJob) -> Quantity:
    """Return the seconds of one sleep and one wake of all engines, which do so together."""
    given = job.assumptions
    seconds = given.sleep_seconds + given.wake_seconds
    return Quantity(
        seconds, "s", f"{given.sleep_seconds:g} s sleep_seconds + {given.wake_seconds:g} s wake"
    )


def saves(job: PlannedJob) -> Quantity:
    """Return a step's share of the seconds in which a checkpoint stops the trainer: its copy to
    the host, and the writing that steps until the next do not hide (`asynchronous`), or all."""
    settings, given = job.config.checkpoint, job.assumptions
    counts = RankCounts(job)
    reference = job.scores_reference or job.keeps_reference
    copied = max(
        checkpoint_bytes(job.config, counts.of_rank(rank), job.replicas, with_reference=reference)
        for rank in range(job.parallel.pipeline)
    )
    seconds = copied / (job.hardware.host_link * given.link_efficiency)
    formula = f"{in_bytes(copied)} of a rank to its host"
    if not settings.asynchronous:
        seconds += copied / given.storage
        formula += " and to storage"
    return Quantity(
        seconds / settings.every, "s", f"({formula}) / checkpoint.every={settings.every}"
    )
