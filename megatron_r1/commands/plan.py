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

from megatron_r1.base.files import atomic_write
from megatron_r1.config import infer_verb
from megatron_r1.config.hardware import GIB
from megatron_r1.plan.arguments import load_recipe, parse, planned_job
from megatron_r1.plan.calibration import calibrate_from
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import PlannedJob, check_trainer
from megatron_r1.plan.published import published_table
from megatron_r1.plan.push import check_engines_and_push
from megatron_r1.plan.report import as_json, as_text, layouts_text, sizes_text
from megatron_r1.plan.search import FittingLayout, fastest, nearest, nearest_sizes
from megatron_r1.plan.timing import sum_quantities, total_hours

FITS, UNFIT, REFUSED = range(3)
VERDICTS = {FITS: "fits", UNFIT: "does not fit", REFUSED: "refused"}
"""The verdict of each exit status; for several recipes the highest is returned."""


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if it fits, 1 if not, 2 if the recipe or the options are wrong."""
    try:
        args, overrides = parse(sys.argv[1:] if arguments is None else arguments, __doc__)
        if args.published:
            print(published_table())
            return FITS
        if args.calibrate_from:
            folder, file = args.calibrate_from
            print(calibrate_from(folder, file, args, overrides))
            return FITS
    except ValueError as error:
        return _refused(error)
    if len(args.recipes) == 1:
        return _plan(args.recipes[0], args, overrides)
    statuses = {}
    for recipe in args.recipes:
        print(f"== {recipe} ==", flush=True)
        statuses[recipe] = _plan(recipe, args, overrides)
        print()
    print("\n".join(f"{VERDICTS[status]:12}  {recipe}" for recipe, status in statuses.items()))
    return max(statuses.values())


def _plan(recipe: Path, args: argparse.Namespace, overrides: dict) -> int:
    """Print the estimate of one recipe; return its exit status."""
    try:
        job = planned_job(recipe, args, overrides)
    except ValueError as error:
        return _refused(error)
    if not _can_work(job):
        return UNFIT
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
        layouts = fastest(job)
        print("\n" + layouts_text(job, layouts, "fastest"))
    if args.build:
        from megatron_r1.plan.build import build_ranks

        print("\n" + build_ranks(job))
    if args.json:
        plan = as_json(estimate, problems, layouts)
        try:
            atomic_write(args.json, json.dumps(plan, indent=1, default=str, allow_nan=False) + "\n")
        except OSError as error:
            return _refused(f"--json: {args.json} cannot be written: {error.strerror}")
    try:
        return UNFIT if problems else _later_phases(recipe, args, overrides)
    except ValueError as error:
        return _refused(error)


def _later_phases(recipe: Path, args: argparse.Namespace, overrides: dict) -> int:
    """Print a line for each later change of `rl.schedule`, which only rl follows, unless --step
    chose one; return the exit status."""
    status = FITS
    config = load_recipe(recipe, overrides)
    # The estimate above is of step 1.
    later = [entry for entry in config.rl.schedule if entry.from_step > 1]
    if args.step or not later or infer_verb(config) != "rl":
        return status
    steps = [1, *(entry.from_step for entry in later)]
    each_step = [JobEstimate(planned_job(recipe, args, overrides, 1)).step]
    for entry in later:
        job = planned_job(recipe, args, overrides, entry.from_step)
        changes = ", ".join(f"{key}={value}" for key, value in entry.changes.items())
        print(f"\nfrom step {entry.from_step} ({changes}; --step {entry.from_step} shows all):")
        if not _can_work(job):
            status = UNFIT
            continue
        estimate = JobEstimate(job)
        each_step.append(estimate.step)
        problems = estimate.problems()
        limits = f" ({estimate.step.limits})" if estimate.step.limits else ""
        peak = estimate.worst.peak / GIB
        print(f"  {peak:.0f} GiB on the fullest GPU, {estimate.step} a step{limits}")
        print("\n".join(f"  does not fit: {problem}" for problem in problems) or "  fits")
        print("".join(f"  note: {note}\n" for note in estimate.notes()), end="")
        status = UNFIT if problems else status
    ends = [*steps[1:], config.run.steps + 1]
    if len(each_step) == len(steps) and all(each.value is not None for each in each_step):
        parts = [
            total_hours(each, end - first, "")
            for first, end, each in zip(steps, ends, each_step, strict=True)
        ]
        total = sum_quantities(parts, "")
        limits = f" ({total.limits})" if total.limits else ""
        print(f"\nthe run of {config.run.steps} steps: {total}{limits}")
    return status


def _refused(error: object) -> int:
    print(f"megatron-r1 plan: {error}", file=sys.stderr)
    return REFUSED


def _print_nearest(job: PlannedJob) -> list[FittingLayout]:
    layouts = nearest(job)
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
            check_trainer(job)
    except ValueError as error:
        print(f"cannot work: {error}")
        _print_nearest(job)
        return False
    return True
