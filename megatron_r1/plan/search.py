"""Searches layouts of the same job that fit: nearest to the recipe's, or fastest, first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice, product
from operator import attrgetter, itemgetter
from typing import Any

from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.job_checks import check_planned_layout
from megatron_r1.plan.push_costs import check_engines_and_push


@dataclass(frozen=True)
class FittingLayout:
    """A layout that fits.

    Attributes:
        changes: the keys of `parallel` that differ.
        distance: the distance from the recipe's layout (`_layout_distance`).
        peak: bytes of the fullest rank.
        seconds: the duration of a step."""

    changes: dict[str, Any]
    distance: float
    peak: int
    seconds: float


def nearest_layouts(job: PlannedJob, count: int = 5) -> list[FittingLayout]:
    """Return layouts that fit, fewest and smallest changes first."""
    candidates = sorted(_candidate_layouts(job), key=itemgetter(0))
    layouts = filter(None, (_find_fitting_layout(job, *candidate) for candidate in candidates))
    return sorted(islice(layouts, count), key=attrgetter("distance", "seconds"))


def fastest_layouts(job: PlannedJob, count: int = 10) -> list[FittingLayout]:
    """Return layouts that fit, shortest estimated step first."""
    layouts = filter(
        None, (_find_fitting_layout(job, *candidate) for candidate in _candidate_layouts(job))
    )
    return sorted(layouts, key=attrgetter("seconds"))[:count]


def nearest_sizes(job: PlannedJob) -> list[PlannedJob]:
    """Return the job in its own layout on the nearest smaller and larger numbers of GPUs on which
    it fits, in factors of two."""
    parallel = job.parallel
    replica = parallel.tensor * parallel.context * parallel.pipeline
    experts = parallel.expert_tensor * parallel.expert * parallel.pipeline
    smallest_size = math.lcm(replica, experts)
    largest_size = job.num_responses // job.num_minibatches * replica
    rollout = job.config.rollout
    engine_gpus = 1 if job.rollout_gpus else rollout.tensor_parallel * rollout.data_parallel
    sizes = [
        size for n in range(20) if engine_gpus <= (size := smallest_size * 2**n) <= largest_size
    ]
    smaller_sizes = (size for size in reversed(sizes) if size < job.world_size)
    larger_sizes = (size for size in sizes if size > job.world_size)
    jobs = (
        next(filter(_fits_always, map(job.with_gpus, side)), None)
        for side in (smaller_sizes, larger_sizes)
    )
    return [job_found for job_found in jobs if job_found]


def _fits_always(job: PlannedJob) -> bool:
    """Return whether every part of `rl.schedule` fits; mean lengths grow with their limit."""
    limit = job.config.rollout.max_response_tokens
    configs = [job.config]
    if job.verb == "rl":
        configs = [config for _, config in job.config.schedule_parts()]
    for config in configs:
        response = job.response_tokens * config.rollout.max_response_tokens // limit
        part = replace(job, config=config, response_tokens=response)
        try:
            if part.generates:
                check_engines_and_push(part)
        except ValueError:
            return False
        if _fitting_estimate(part) is None:
            return False
    return True


def _fitting_estimate(job: PlannedJob) -> JobEstimate | None:
    try:
        if job.trains:
            check_planned_layout(job)
    except ValueError:
        return None
    estimate = JobEstimate(job)
    return None if estimate.problems() else estimate


def even_layout(num_layers: int, num_mtp: int, chunks: int) -> str | None:
    """Return a pipeline layout that counts the head as one layer; None if the default is even.

    Args:
        num_layers: decoder layers.
        num_mtp: MTP layers, which the last stage has.
        chunks: stages, virtual ones counted."""
    if chunks == 1 or num_layers % chunks == 0:
        return None
    last_length = max(1, (num_layers + 1) // chunks - 1)
    short_length, num_longer = divmod(num_layers - last_length, chunks - 1)
    lengths = [short_length + (index >= chunks - 1 - num_longer) for index in range(chunks - 1)]
    if not short_length:
        return None
    text = ""
    for length, run in groupby(lengths):
        stage, times = f"{_layer_letters(length)}|", len(list(run))
        text += stage if times == 1 else f"({stage})*{times}"
    return f"E{text}{_layer_letters(last_length)}{'m' * num_mtp}L"


def _layer_letters(count: int) -> str:
    return "t" if count == 1 else f"t*{count}"


def _candidate_layouts(job: PlannedJob) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield (distance, changes of parallel) of every candidate layout."""
    powers = [2**n for n in range(11)]
    layers = job.hf_config["num_hidden_layers"]
    choices = {
        "tensor": [n for n in powers if n <= job.hardware.gpus_per_node],
        "context": [n for n in powers if n <= 64],
        "pipeline": [n for n in powers if n <= layers],
        "expert": [n for n in powers if n <= max(1, job.weight_table.num_experts)],
        "expert_tensor": [1],
        "virtual_pipeline": [1, 2, 3],
        "recompute": ["none", "selective", "full"],
    }
    for values in product(*choices.values()):
        tensor, context, pipeline, expert, _, virtual, _ = values
        if job.world_size % (tensor * context * pipeline) or virtual > 1 == pipeline:
            continue
        if job.world_size % (expert * pipeline) or pipeline * virtual > layers:
            continue
        changes = dict(zip(choices, values, strict=True))
        yield _layout_distance(job, changes), changes


def _cheap_modules(job: PlannedJob) -> list[str]:
    """Return modules that are cheap to recompute: no matrix product but the latents' up-projection
    (DeepSeek-V3 report, section 3.2.3)."""
    latent, experts = ["mla_up_proj"] * job.latent_attention, ["moe_act"] * job.has_experts
    return ["layernorm", *latent, *experts]


def _layout_distance(job: PlannedJob, changes: dict[str, Any]) -> float:
    """Return the number of doublings and halvings of sizes; a change of recompute counts as 1."""
    sizes = {key: size for key, size in changes.items() if key != "recompute"}
    doublings = (abs(math.log2(size / getattr(job.parallel, key))) for key, size in sizes.items())
    return sum(doublings) + (changes["recompute"] != job.parallel.recompute)


def _find_fitting_layout(
    job: PlannedJob, distance: float, changes: dict[str, Any]
) -> FittingLayout | None:
    chunks = changes["pipeline"] * changes["virtual_pipeline"]
    keeps_stages = all(
        getattr(job.parallel, k) == changes[k] for k in ("pipeline", "virtual_pipeline")
    )
    if not keeps_stages:
        num_mtp = len(job.weight_table.mtp) if job.with_mtp else 0
        changes["pipeline_layout"] = even_layout(
            job.hf_config["num_hidden_layers"], num_mtp, chunks
        )
    if changes["recompute"] == "selective" != job.parallel.recompute:
        changes["recompute_modules"] = _cheap_modules(job)
    estimate = _fitting_estimate(job.with_parallel(**changes))
    if estimate is None or estimate.step.value is None:
        return None
    parallel_changes = {k: v for k, v in changes.items() if getattr(job.parallel, k) != v}
    return FittingLayout(
        parallel_changes, distance, estimate.peak_rank.peak_bytes, estimate.step.number
    )
