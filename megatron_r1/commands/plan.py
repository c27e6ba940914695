"""`megatron-r1 plan RECIPE.yaml … [--gpus N] [--json FILE] [--section.key value …]`: what a run
needs, before a GPU is rented.

Parameters, memory of every rank, traffic, operations and time of a recipe's run, each with its
formula, from the tables and settings that the run itself uses. For a layout that cannot work, the
reason and the nearest layouts that fit are printed, and the exit status is 1. Several recipes get
an estimate each, and a list of verdicts at the end. `--build` also builds the real ranks of the
layout on torch's meta device and compares every parameter with the plan."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_r1.base.files import atomic_write
from megatron_r1.config import infer_verb
from megatron_r1.plan.calibration import calibrate_from
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.estimate_output import as_json, as_text, layouts_text, sizes_text
from megatron_r1.plan.hardware import GIB
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.job_checks import check_planned_layout
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.published_table import published_table
from megatron_r1.plan.push_costs import check_engines_and_push
from megatron_r1.plan.quantity import sum_quantities, total_hours
from megatron_r1.plan.recipe_job import load_planned_recipe, planned_job
from megatron_r1.plan.search import FittingLayout, fastest_layouts, nearest_layouts, nearest_sizes

EXIT_FITS, EXIT_UNFIT, EXIT_BAD_RECIPE = range(3)
VERDICT_TEXTS = {EXIT_FITS: "fits", EXIT_UNFIT: "does not fit", EXIT_BAD_RECIPE: "refused"}
"""The verdict of each exit status; for several recipes the highest is returned."""


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if it fits, 1 if not, 2 if the recipe or the options are wrong."""
    try:
        args, overrides = parse_job_arguments(
            sys.argv[1:] if arguments is None else arguments, __doc__
        )
        if args.published:
            print(published_table())
            return EXIT_FITS
        if args.calibrate_from:
            folder, file = args.calibrate_from
            print(calibrate_from(folder, file, args, overrides))
            return EXIT_FITS
    except ValueError as error:
        return _print_refusal(error)
    if len(args.recipes) == 1:
        status = _plan_recipe(args.recipes[0], args, overrides)
        if status == EXIT_FITS:  # others have said why
            print(f"\n{VERDICT_TEXTS[status]}: {args.recipes[0]}")
        return status
    statuses = {}
    for recipe in args.recipes:
        print(f"== {recipe} ==", flush=True)
        statuses[recipe] = _plan_recipe(recipe, args, overrides)
        print()
    print("\n".join(f"{VERDICT_TEXTS[status]:12}  {recipe}" for recipe, status in statuses.items()))
    return max(statuses.values())


def _plan_recipe(recipe: Path, args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print the estimate of one recipe; return its exit status."""
    try:
        job = planned_job(recipe, args, overrides)
    except ValueError as error:
        return _print_refusal(error)
    if not _can_work(job):
        return EXIT_UNFIT
    estimate = JobEstimate(job)
    problems = estimate.problems()
    print(as_text(estimate))
    print("".join(f"\nnote: {note}\n" for note in estimate.notes()), end="")
    layouts = []
    if problems:
        print("\n" + "\n".join(f"does not fit: {problem}" for problem in problems))
        if job.trains:
            layouts = _print_nearest(job)
    elif args.search:
        layouts = fastest_layouts(job)
        print("\n" + layouts_text(job, layouts, "fastest"))
    if args.build:
        from megatron_r1.plan.build import build_ranks

        print("\n" + build_ranks(job))
    if args.json:
        plan = as_json(estimate, problems, layouts)
        try:
            atomic_write(args.json, json.dumps(plan, indent=1, default=str, allow_nan=False) + "\n")
        except OSError as error:
            return _print_refusal(f"--json: {args.json} cannot be written: {error.strerror}")
    try:
        return EXIT_UNFIT if problems else _later_phases(recipe, args, overrides)
    except ValueError as error:
        return _print_refusal(error)


def _later_phases(recipe: Path, args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print a line for each later change of `rl.schedule`, which only rl follows, unless --step
    chose one; return the exit status."""
    status = EXIT_FITS
    config = load_planned_recipe(recipe, overrides)
    # The estimate above is of step 1.
    later_entries = [entry for entry in config.rl.schedule if entry.from_step > 1]
    if args.step or not later_entries or infer_verb(config) != "rl":
        return status
    steps = [1, *(entry.from_step for entry in later_entries)]
    step_times = [JobEstimate(planned_job(recipe, args, overrides, 1)).step]
    for entry in later_entries:
        job = planned_job(recipe, args, overrides, entry.from_step)
        changes = ", ".join(f"{key}={value}" for key, value in entry.changes.items())
        print(f"\nfrom step {entry.from_step} ({changes}; --step {entry.from_step} shows all):")
        if not _can_work(job):
            status = EXIT_UNFIT
            continue
        estimate = JobEstimate(job)
        step_times.append(estimate.step)
        problems = estimate.problems()
        limits = f" ({estimate.step.limits})" if estimate.step.limits else ""
        peak = estimate.peak_rank.peak_bytes / GIB
        print(f"  {peak:.0f} GiB on the fullest GPU, {estimate.step} a step{limits}")
        print("\n".join(f"  does not fit: {problem}" for problem in problems) or "  fits")
        print("".join(f"  note: {note}\n" for note in estimate.notes()), end="")
        status = EXIT_UNFIT if problems else status
    ends = [*steps[1:], config.run.steps + 1]
    if len(step_times) == len(steps) and all(
        step_time.value is not None for step_time in step_times
    ):
        parts = [
            total_hours(step_time, end - first, "")
            for first, end, step_time in zip(steps, ends, step_times, strict=True)
        ]
        total = sum_quantities(parts, "")
        limits = f" ({total.limits})" if total.limits else ""
        print(f"\nthe run of {config.run.steps} steps: {total}{limits}")
    return status


def _print_refusal(error: object) -> int:
    print(f"megatron-r1 plan: {error}", file=sys.stderr)
    return EXIT_BAD_RECIPE


def _print_nearest(job: PlannedJob) -> list[FittingLayout]:
    layouts = nearest_layouts(job)
    print(layouts_text(job, layouts, "nearest", () if layouts else nearest_sizes(job)))
    return layouts


def _can_work(job: PlannedJob) -> bool:
    """Return whether engines and trainer are possible; print why not, and layouts that fit."""
    try:
        if job.generates:
            check_engines_and_push(job)
    except ValueError as error:
        print(f"cannot work: {error}")
        if sizes := nearest_sizes(job):
            print(f"the recipe's layout fits with {sizes_text(job, sizes)}")
        return False
    try:
        if job.trains:
            check_planned_layout(job)
    except ValueError as error:
        print(f"cannot work: {error}")
        _print_nearest(job)
        return False
    return True
