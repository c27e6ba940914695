"""Refusals of jobs whose trainer or engines are impossible for the model, or on their GPUs."""

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.controller.trainer_calls.packing import check_batches
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.models.supported import check_divisions, check_exchange_overlap
from megatron_r1.plan.job import PlannedJob


def check_trainer(job: PlannedJob) -> None:
    """Raise ValueError, by name, for settings of `parallel` that are impossible for the model
    or on these GPUs."""
    job.parallel.check_sizes(job.world_size)
    job.parallel.splits_sequences(job.has_experts)  # raises where experts need it
    check_divisions(job.hf, job.parallel, transformer_engine=True)
    check_exchange_overlap(job.config, job.hf)
    check_batches(job.config, job.verb, job.world_size, "GPU")
    assert job.stages, "building them checks the layout"


def check_engine_gpus(job: PlannedJob) -> None:
    """Raise ValueError for engines that are impossible, or impossible on these GPUs."""
    rollout, gpus = job.config.rollout, job.rollout_gpus or job.world_size
    check_engines(job.config, job.hf)
    if rollout.pipeline > 1:
        raise UserError(
            f"rollout.pipeline={rollout.pipeline}: engines with stages are not planned for; use 1",
            key="rollout.pipeline",
            cause=Cause.UNSUPPORTED,
        )
    ranks = rollout.tensor * rollout.data
    if ranks == 1 and gpus % rollout.engines:
        raise UserError(
            f"rollout.engines={rollout.engines} does not divide {gpus:,} GPUs; choose "
            f"{_alternatives(_nearest_divisors(rollout.engines, gpus))}",
            key="rollout.engines",
            cause=Cause.INDIVISIBLE,
        )
    if ranks > 1 and ranks * rollout.engines != gpus:
        raise UserError(
            f"rollout.engines={rollout.engines} of {ranks} GPUs (rollout.tensor="
            f"{rollout.tensor} x rollout.data={rollout.data}) are {ranks * rollout.engines:,} "
            f"GPUs, not {gpus:,}; {_engines_that_match(job, ranks, gpus)}",
            key="rollout.engines",
            cause=Cause.CONFLICT,
        )


def _engines_that_match(job: PlannedJob, ranks: int, gpus: int) -> str:
    """Return the remedy if engines of `ranks` GPUs do not add up to `gpus`."""
    if gpus % ranks == 0:
        return f"set --rollout.engines {gpus // ranks}"
    option = "--rollout-gpus" if job.rollout_gpus else "--gpus"
    below = gpus // ranks
    counts = [count for count in (below, below + 1) if count]
    sizes = [f"{option} {count * ranks} --rollout.engines {count}" for count in counts]
    or_lower = "" if below else ", or lower rollout.data or .tensor"
    return f"{_alternatives(sizes)} would match{or_lower}"


def _nearest_divisors(target: int, of: int) -> list[int]:
    """Return the largest divisor below `target` and the smallest above, if there are any."""
    below = [n for n in range(1, min(target, of + 1)) if of % n == 0]
    above = [n for n in range(target + 1, of + 1) if of % n == 0]
    return [*below[-1:], *above[:1]]


def _alternatives(choices: list) -> str:
    """Return the choices as "A or B or C"."""
    return " or ".join(map(str, choices))
