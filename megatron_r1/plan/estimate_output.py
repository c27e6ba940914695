"""Writes an estimate and the layouts that fit, as text for people and as JSON."""

import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from megatron_r1.config.yaml_text import format_value as as_yaml
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.pass_memory import not_asked
from megatron_r1.plan.quantity import Quantity, byte_quantity
from megatron_r1.plan.search import FittingLayout
from megatron_r1.reporting.formatting import format_count

LINE_WIDTH = 110
_NAME_WIDTH, _VALUE_WIDTH = 24, 14


def as_text(estimate: JobEstimate) -> str:
    """Return every number with its formula next to it."""
    lines = [_format_title(estimate)]
    for title, section in estimate.sections().items():
        if not section:
            continue
        lines += ["", title]
        for name, quantity in section.items():
            head = f"  {name:{_NAME_WIDTH}} {quantity!s:>{_VALUE_WIDTH}}  "
            limits = f"{quantity.limits}: " if quantity.limits else ""
            wrapped = textwrap.wrap(
                limits + quantity.formula,
                LINE_WIDTH,
                initial_indent=head,
                subsequent_indent=" " * len(head),
            )
            lines += wrapped or [head.rstrip()]
    return "\n".join(lines)


def as_json(
    estimate: JobEstimate, problems: list[str], other_layouts: list[FittingLayout]
) -> dict[str, Any]:
    """Return {section: {name: {value, unit, formula}}}, every pipeline rank's memory in bytes, the
    assumptions, and what does not fit.

    Args:
        estimate: the estimate of the job.
        problems: a sentence for each limit that is exceeded.
        other_layouts: layouts that fit."""
    job, sections = estimate.job, estimate.sections()
    return {
        "verb": job.verb,
        "gpus": job.world_size,
        "hardware": vars(job.hardware),
        "assumptions": vars(job.assumptions) | {"response_tokens": job.response_tokens},
        "parallel": job.parallel.model_dump() | {"data": job.data_parallel_size},
        "sections": {
            title: {name: _quantity_entries(quantity) for name, quantity in section.items()}
            for title, section in sections.items()
        },
        "not asked": [name for section in sections.values() for name in not_asked(section)],
        "ranks": [
            {
                "pipeline_rank": rank.rank,
                "parameters": rank.counts.parameters,
                "training": rank.training,
                "logprobs": rank.logprobs,
                "host": rank.host,
            }
            for rank in estimate.ranks
        ],
        "problems": problems,
        "layouts": [vars(fitting_layout) for fitting_layout in other_layouts],
    }


def _quantity_entries(quantity: Quantity) -> dict[str, Any]:
    """Return {value, unit, formula}, and of an estimate with a range its ends, low and high."""
    ends = ("low", "high")
    return {k: v for k, v in vars(quantity).items() if k not in ends or v is not None}


def layouts_text(
    job: PlannedJob,
    other_layouts: list[FittingLayout],
    label: str,
    other_sizes: Sequence[PlannedJob] = (),
) -> str:
    """Return a line per layout with its changes and costs.

    Args:
        job: the recipe's, as planned.
        other_layouts: those that fit, in the order of their lines.
        label: the layouts' name in the text.
        other_sizes: the same layout on other numbers of GPUs, named if `other_layouts` is empty."""
    title = f"{label} layouts that fit (fullest rank, estimated step without its range)"
    if not other_layouts:
        remedy = "use more GPUs, or GPUs with more memory"
        if other_sizes:
            remedy = f"the recipe's layout fits with {sizes_text(job, other_sizes)}"
        return f"{title}: none on {job.world_size:,} {job.hardware.name}; {remedy}"
    lines = [f"{title}:"]
    for fitting_layout in other_layouts:
        changes = " ".join(
            f"--parallel.{key} {shlex.quote(as_yaml(value))}"
            for key, value in fitting_layout.changes.items()
        )
        peak, seconds = byte_quantity(fitting_layout.peak), Quantity(fitting_layout.seconds, "s")
        lines.append(f"  {peak!s:>10}, {seconds!s:>8} a step   {changes or '(the recipe)'}")
    return "\n".join(lines)


def sizes_text(job: PlannedJob, other_jobs: Sequence[PlannedJob]) -> str:
    """Return the options that change `job` into each of `other_jobs`, on other numbers of GPUs."""
    options = []
    for other_job in other_jobs:
        engines = other_job.config.rollout.engines
        changes_engines = job.generates and engines != job.config.rollout.engines
        engine_option = f" --rollout.engines {engines}" if changes_engines else ""
        options.append(f"--gpus {other_job.world_size}{engine_option}")
    return " or ".join(options)


def _format_title(estimate: JobEstimate) -> str:
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
            f"data {job.data_parallel_size}; "
            f"{format_count(job.num_microbatches, 'micro-batch')} an optimizer step"
        )
    if job.generates:
        gpus_text = "the same GPUs, in turn"
        if job.rollout_gpus or not job.trains:
            gpus_text = "GPUs of their own"
        engines = format_count(job.config.rollout.engines, "engine")
        lines.append(f"{engines} of {format_count(job.engine_gpus, 'GPU')}, on {gpus_text}")
        if job.trains and not job.rollout_gpus and not job.config.rollout.colocated:
            lines.append(_colocation_hint(job))
    lines.append(
        f"assumed: responses of {format_count(job.response_tokens, 'token')} on average, prompts "
        f"of {job.assumptions.prompt_tokens:,}; rates and efficiencies: last section"
    )
    return "\n".join(lines)


def _colocation_hint(job: PlannedJob) -> str:
    """Return the hint for a recipe with separate engines but no --rollout-gpus."""
    rollout = job.config.rollout
    ranks = rollout.tensor_parallel * rollout.data_parallel
    gpus = str(rollout.engines * ranks)
    if ranks == 1:
        gpus = "N" if rollout.engines == 1 else f"N, a multiple of rollout.engines={gpus}"
    return textwrap.fill(
        "rollout.colocated is false, but without --rollout-gpus the engines are counted on the "
        f"trainer's GPUs: for GPUs of their own pass --rollout-gpus {gpus}",
        LINE_WIDTH,
        break_on_hyphens=False,
    )
