"""Seconds between the phases of a step, in which engines load pushed weights, sleep and wake, or
the trainer saves a checkpoint."""

import json
from functools import lru_cache

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.memory import checkpoint_bytes
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push import drafts_with_mtp, planned_engine_layout, planned_rank_bytes
from megatron_r1.plan.quantity import Quantity, byte_quantity
from megatron_r1.push.plan import EngineLayout
from megatron_r1.push.plan.predicted_sharding import PredictedSharding


def weight_load_time(job: PlannedJob) -> Quantity:
    """Return the seconds in which an engine GPU takes pushed weights out of its receive buffer."""
    assumptions, weights = job.assumptions, planned_rank_bytes(job)
    layout = planned_engine_layout(job)
    tensors = _num_tensors(json.dumps(job.hf_config), layout, drafts_with_mtp(job))
    rate = job.hardware.memory_bandwidth * assumptions.bandwidth_efficiency / 2  # read and written
    route = "read and written in the GPU's memory"
    if TRANSPORTS[job.config.push.transport].memory == "host":
        rate = job.hardware.host_link * assumptions.link_efficiency
        route = "through the host's link"
    return Quantity(
        weights / rate + tensors * assumptions.tensor_load_seconds,
        "s",
        f"{byte_quantity(weights)} {route}, and {tensors:,} tensors x "
        f"{assumptions.tensor_load_seconds:g} s",
    )


@lru_cache
def _num_tensors(hf_config_json: str, layout: EngineLayout, drafts: bool) -> int:
    """Return the tensors of an engine's first GPU."""
    sharding = PredictedSharding(json.loads(hf_config_json), layout, drafts=drafts)
    return sum(1 for _ in sharding.regions_of(layout.coordinate(0)))


def sleep_wake_time(job: PlannedJob) -> Quantity:
    """Return the seconds of one sleep and one wake of all engines, which do so together."""
    assumptions = job.assumptions
    seconds = assumptions.sleep_seconds + assumptions.wake_seconds
    return Quantity(
        seconds,
        "s",
        f"{assumptions.sleep_seconds:g} s sleep_seconds + {assumptions.wake_seconds:g} s wake",
    )


def checkpoint_time(job: PlannedJob) -> Quantity:
    """Return a step's share of the seconds in which a checkpoint stops the trainer.

    These are of its copy to the host and, unless `checkpoint.asynchronous`, of its writing."""
    settings, assumptions = job.config.checkpoint, job.assumptions
    counts = RankCounts(job)
    keeps_reference = job.computes_ref_logprobs or job.keeps_reference
    copied_bytes = max(
        checkpoint_bytes(
            job.config,
            counts.rank_counts(rank),
            job.optimizer_shards,
            with_reference=keeps_reference,
        )
        for rank in range(job.parallel.pipeline)
    )
    seconds = copied_bytes / (job.hardware.host_link * assumptions.link_efficiency)
    formula = f"{byte_quantity(copied_bytes)} of a rank to its host"
    if not settings.asynchronous:
        seconds += copied_bytes / assumptions.storage
        formula += " and to storage"
    return Quantity(
        seconds / settings.every, "s", f"({formula}) / checkpoint.every={settings.every}"
    )
