"""The estimate as text and as JSON."""

import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from megatron_r1.config.yaml_text import format_value as as_yaml
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, byte_quantity
from megatron_r1.plan.search import FittingLayout
from megatron_r1.reporting.wording import counted

WIDTH = 110
_NAME, _VALUE = 24, 14


def as_text(estimate: JobEstimate) -> str:
    """Return every number with its formula next to it."""
    lines = [_title(estimate)]
    for title, section in estimate.sections().items():
        if not section:
            continue
        lines += ["", title]
        for name, quantity in section.items():
            head = f"  {name:{_NAME}} {quantity!s:>{_VALUE}}  "
            limits = f"{quantity.limits}: " if quantity.limits else ""
            wrapped = textwrap.wrap(
                limits + quantity.formula,
                WIDTH,
                initial_indent=head,
                subsequent_indent=" " * len(head),
            )
            lines += wrapped or [head.rstrip()]
    return "\n".join(lines)


def as_json(
    estimate: JobEstimate, problems: list[str], others: list[FittingLayout]
) -> dict[str, Any]:
    """Return {section: {name: {value, unit, formula}}}, every pipeline rank's memory in bytes, the
    assumptions, and what does not fit.

    Args:
        estimate: the estimate of the job.
        problems: a sentence for each limit that is exceeded.
        others: layouts that fit."""
    job = estimate.job
    return {
        "verb": job.verb,
        "gpus": job.world_size,
        "hardware": vars(job.hardware),
        "assumptions": vars(job.assumptions) | {"response_tokens": job.response_tokens},
        "parallel": job.parallel.model_dump() | {"data": job.data_parallel},
        "sections": {
            title: {name: _entries(quantity) for name, quantity in section.items()}
            for title, section in estimate.sections().items()
        },
        "ranks": [
            {
                "pipeline_rank": rank.rank,
                "parameters": rank.counts.parameters,
                "training": rank.training,
                "scoring": rank.scoring,
                "host": rank.host,
            }
            for rank in estimate.ranks
        ],
        "problems": problems,
        "layouts": [vars(found) for found in others],
    }


def _entries(quantity: Quantity) -> dict[str, Any]:
    """Return {value, unit, formula}, and of an estimate with a range its ends, low and high."""
    ends = ("low", "high")
    return {k: v for k, v in vars(quantity).items() if k not in ends or v is not None}


def layouts_text(
    job: PlannedJob, others: list[FittingLayout], which: str, other_sizes: Sequence[PlannedJob] = ()
) -> str:
    """Return a line per layout with its changes and costs.

    Args:
        job: the planned job.
        others: the layouts.
        which: the layouts' name in the text.
        other_sizes: the same layout on other numbers of GPUs, named if `others` is empty."""
    title = f"{which} layouts that fit (fullest rank, estimated step)"
    if not others:
        remedy = "use more GPUs, or GPUs with more memory"
        if other_sizes:
            remedy = f"the recipe's layout fits with {sizes_text(job, other_sizes)}"
        return f"{title}: none on {job.world_size:,} {job.hardware.name}; {remedy}"
    lines = [f"{title}:"]
    for found in others:
        changes = " ".join(
            f"--parallel.{key} {shlex.quote(as_yaml(value))}"
            for key, value in found.changes.items()
        )
        peak, seconds = byte_quantity(found.peak), Quantity(found.seconds, "s")
        lines.append(f"  {peak!s:>10}, {seconds!s:>8} a step   {changes or '(the recipe)'}")
    return "\n".join(lines)


def sizes_text(job: PlannedJob, others: Sequence[PlannedJob]) -> str:
    """Return the options that change `job` into each of `others`, on other numbers of GPUs."""
    options = []
    for other in others:
        engines = other.config.rollout.engines
        changed = job.generates and engines != job.config.rollout.engines
        adapted = f" --rollout.engines {engines}" if changed else ""
        options.append(f"--gpus {other.world_size}{adapted}")
    return " or ".join(options)


def _title(estimate: JobEstimate) -> str:
    job, parallel = estimate.job, estimate.job.parallel
    lines = [
        f"{job.config.model.path} on {job.world_size:,} {job.hardware.name} "
        f"({Quantity(job.hardware.memory, 'B', '')} each)"
    ]
    if job.trains:
        lines.append(
            f"trainer: tensor {parallel.tensor}, pipeline {parallel.pipeline} x "
            f"{job.num_model_chunks}, "
            f"context {parallel.context}, expert {parallel.expert} x {parallel.expert_tensor}, "
            f"data {job.data_parallel}; "
            f"{counted(job.num_microbatches, 'micro-batch')} an optimizer step"
        )
    if job.generates:
        where = "the same GPUs, in turn"
        if job.rollout_gpus or not job.trains:
            where = "GPUs of their own"
        engines = counted(job.config.rollout.engines, "engine")
        lines.append(f"{engines} of {counted(job.engine_gpus, 'GPU')}, on {where}")
        if job.trains and not job.rollout_gpus and not job.config.rollout.colocated:
            lines.append(_not_colocated(job))
    lines.append(
        f"assumed: responses of {counted(job.response_tokens, 'token')} on average, prompts of "
        f"{job.assumptions.prompt_tokens:,}; rates and efficiencies: last section"
    )
    return "\n".join(lines)


def _not_colocated(job: PlannedJob) -> str:
    """Return the hint for a recipe with separate engines but no --rollout-gpus."""
    rollout = job.config.rollout
    ranks = rollout.tensor * rollout.data
    gpus = str(rollout.engines * ranks)
    if ranks == 1:
        gpus = "N" if rollout.engines == 1 else f"N, a multiple of rollout.engines={gpus}"
    return textwrap.fill(
        "rollout.colocated is false, but without --rollout-gpus the engines are counted on the "
        f"trainer's GPUs: for GPUs of their own pass --rollout-gpus {gpus}",
        WIDTH,
        break_on_hyphens=False,
    )
