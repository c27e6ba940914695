"""Refuses jobs whose trainer or engines are impossible for the model, or on their GPUs."""

from __future__ import annotations

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.controller.trainer_calls.packing import check_batches
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.engines.server.vllm_arguments import compilation_config
from megatron_r1.models.exchange_overlap_checks import check_exchange_overlap
from megatron_r1.models.parallel_checks import check_divisions
from megatron_r1.plan.job import PlannedJob


def check_planned_layout(job: PlannedJob) -> None:
    """Raise ValueError, by name, for settings of `parallel` that are impossible for the model
    or on these GPUs."""
    job.parallel.check_sizes(job.world_size)
    job.parallel.splits_sequences(job.has_experts)  # raises where experts need it
    check_divisions(job.hf_config, job.parallel, transformer_engine=True)
    check_exchange_overlap(job.config, job.hf_config)
    check_batches(job.config, job.verb, job.world_size, "GPU")
    assert job.pipeline_stages, "building them checks the layout"


def check_engine_gpus(job: PlannedJob) -> None:
    """Raise ValueError for engines that are impossible, or impossible on these GPUs."""
    rollout, gpus = job.config.rollout, job.rollout_gpus or job.world_size
    check_engines(job.config, job.hf_config)
    compilation_config(rollout.vllm)  # raises for what vLLM refuses
    if rollout.pipeline_parallel > 1:
        raise UserError(
            f"rollout.pipeline_parallel={rollout.pipeline_parallel}: engines with stages are not "
            "planned for; use 1",
            key="rollout.pipeline_parallel",
            cause=Cause.UNSUPPORTED,
        )
    ranks = rollout.tensor_parallel * rollout.data_parallel
    if ranks == 1 and gpus % rollout.engines:
        raise UserError(
            f"rollout.engines={rollout.engines} does not divide {gpus:,} GPUs; choose "
            f"{_join_choices(_nearest_divisors(rollout.engines, gpus))}",
            key="rollout.engines",
            cause=Cause.INDIVISIBLE,
        )
    if ranks > 1 and ranks * rollout.engines != gpus:
        raise UserError(
            f"rollout.engines={rollout.engines} of {ranks} GPUs (rollout.tensor_parallel="
            f"{rollout.tensor_parallel} x rollout.data_parallel={rollout.data_parallel}) are "
            f"{ranks * rollout.engines:,} "
            f"GPUs, not {gpus:,}; {_engines_that_match(job, ranks, gpus)}",
            key="rollout.engines",
            cause=Cause.CONFLICT,
        )


def _engines_that_match(job: PlannedJob, ranks: int, gpus: int) -> str:
    """Return the remedy if engines of `ranks` GPUs do not add up to `gpus`."""
    if gpus % ranks == 0:
        return f"set --rollout.engines {gpus // ranks}"
    option = "--rollout-gpus" if job.rollout_gpus else "--gpus"
    lower_count = gpus // ranks
    counts = [count for count in (lower_count, lower_count + 1) if count]
    sizes = [f"{option} {count * ranks} --rollout.engines {count}" for count in counts]
    or_lower = "" if lower_count else ", or lower rollout.data_parallel or .tensor_parallel"
    return f"{_join_choices(sizes)} would match{or_lower}"


def _nearest_divisors(target: int, dividend: int) -> list[int]:
    """Return the largest divisor below `target` and the smallest above, if there are any."""
    divisors_below = [n for n in range(1, min(target, dividend + 1)) if dividend % n == 0]
    divisors_above = [n for n in range(target + 1, dividend + 1) if dividend % n == 0]
    return [*divisors_below[-1:], *divisors_above[:1]]


def _join_choices(choices: list[int] | list[str]) -> str:
    """Return the choices as "A or B or C"."""
    return " or ".join(map(str, choices))
