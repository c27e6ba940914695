"""`python tools/plan RECIPE.yaml … [--gpus N] [--json FILE] [--section.key value …]`: what a run
needs, before a GPU is rented.

Parameters, memory of every rank, traffic, operations and time of a recipe's run, each with its
formula, from the tables and settings that the run itself uses. For a layout that cannot work, the
reason and the nearest layouts that fit are printed, and the exit status is 1. Several recipes get a
bill each, and a list of verdicts at the end. `--build` also builds the real ranks of the layout on
torch's meta device and compares every parameter with the plan.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1.config.recipe import Verb, parse_overrides, verb_of
from megatron_r1.engine.recipe import context_length
from megatron_r1.errors import UserError
from megatron_r1.files import atomic_write
from megatron_r1.models.hf_config import read_hf_config
from tools.plan.bill import Bill
from tools.plan.hardware import GIB, HARDWARE, Assumptions
from tools.plan.job import Job, text_limit
from tools.plan.push import check_engines
from tools.plan.report import as_json, as_text, layouts_text, sizes_text
from tools.plan.rollout import check_teacher
from tools.plan.search import FittingLayout, fastest, nearest, nearest_sizes

NEAREST = "nearest layouts that fit (fullest rank, estimated step)"
FASTEST = "fastest layouts that fit (fullest rank, estimated step)"


FITS, UNFIT, REFUSED = range(3)
VERDICTS = {FITS: "fits", UNFIT: "does not fit", REFUSED: "refused"}
"""By exit status; for several recipes the highest is returned."""


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if it fits, 1 if not, 2 if the recipe or the options are wrong."""
    chosen, rest = _parser().parse_known_args(arguments)
    try:
        _check_options(chosen, rest)
        overrides = parse_overrides(rest)
    except ValueError as error:
        return _refused(error)
    if len(chosen.recipes) == 1:
        return _plan(chosen.recipes[0], chosen, overrides)
    statuses = {}
    for recipe in chosen.recipes:
        print(f"== {recipe} ==", flush=True)
        statuses[recipe] = _plan(recipe, chosen, overrides)
        print()
    print("\n".join(f"{VERDICTS[status]:12}  {recipe}" for recipe, status in statuses.items()))
    return max(statuses.values())


def _plan(recipe: Path, chosen: argparse.Namespace, overrides: dict) -> int:
    """Print the bill of one recipe; return its exit status."""
    try:
        job = _job(recipe, chosen, overrides)
    except ValueError as error:
        return _refused(error)
    if not _can_work(job):
        return UNFIT
    bill = Bill(job)
    problems = bill.problems()
    print(as_text(bill))
    layouts = []
    if problems:
        print("\n" + "\n".join(f"does not fit: {problem}" for problem in problems))
        if job.trains:
            layouts = _print_nearest(job)
    elif chosen.search:
        layouts = fastest(job)
        print("\n" + layouts_text(job, layouts, FASTEST))
    if chosen.build:
        from tools.plan.build import build_ranks

        print("\n" + build_ranks(job))
    if chosen.json:
        plan = as_json(bill, problems, layouts)
        try:
            atomic_write(
                chosen.json, json.dumps(plan, indent=1, default=str, allow_nan=False) + "\n"
            )
        except OSError as error:
            return _refused(f"--json: {chosen.json} cannot be written: {error.strerror}")
    return max(UNFIT if problems else FITS, _later_phases(recipe, chosen, overrides))


def _later_phases(recipe: Path, chosen: argparse.Namespace, overrides: dict) -> int:
    """Print a line for each change of `rl.schedule`, unless --step chose one; return the exit
    status."""
    status = FITS
    config = _config(recipe, overrides)
    if chosen.step or not config.rl.schedule:
        return status
    steps = [step for step, _ in config.phases()]
    seconds = [Bill(_job(recipe, chosen, overrides, 1)).step_seconds]
    for entry in config.rl.schedule:
        job = _job(recipe, chosen, overrides, entry.from_step)
        changes = ", ".join(f"{key}={value}" for key, value in entry.changes.items())
        print(f"\nfrom step {entry.from_step} ({changes}; --step {entry.from_step} shows all):")
        if not _can_work(job):
            status = UNFIT
            continue
        bill = Bill(job)
        seconds.append(bill.step_seconds)
        problems = bill.problems()
        peak = f"{bill.worst.peak / GIB:.0f} GiB on the fullest GPU, "
        print(f"  {peak if job.trains else ''}{bill.step_seconds:,.0f} s a step")
        print("\n".join(f"  does not fit: {problem}" for problem in problems) or "  fits")
        status = UNFIT if problems else status
    ends = [*steps[1:], config.run.steps + 1]
    if len(seconds) == len(steps):
        parts = zip(steps, ends, seconds, strict=True)
        total = sum((end - first) * each for first, end, each in parts)
        print(f"\nthe run of {config.run.steps} steps: {total / 3600:,.0f} hours")
    return status


def _refused(error: object) -> int:
    print(f"tools/plan: {error}", file=sys.stderr)
    return REFUSED


def _print_nearest(job: Job) -> list[FittingLayout]:
    layouts = nearest(job)
    print(layouts_text(job, layouts, NEAREST, () if layouts else nearest_sizes(job)))
    return layouts


def _can_work(job: Job) -> bool:
    """Return whether engines and trainer are possible; print why not, and layouts that fit."""
    try:
        if job.generates:
            check_engines(job)
    except ValueError as error:
        print(f"cannot work: {error}")
        if sizes := nearest_sizes(job):
            print(f"the recipe's layout fits with {sizes_text(job, sizes)}")
        return False
    try:
        if job.trains:
            job.check_trainer()
    except ValueError as error:
        print(f"cannot work: {error}")
        _print_nearest(job)
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", type=Path, nargs="+", metavar="recipe")
    parser.add_argument("--gpus", type=int, help="default: parallel.processes; of sample: engines'")
    parser.add_argument("--hardware", choices=HARDWARE, default="H800")
    parser.add_argument("--memory-gib", type=float, help="of a GPU, instead of the hardware's")
    parser.add_argument("--host-memory-gib", type=float, help="per GPU, instead of 233")
    parser.add_argument("--rollout-gpus", type=int, help="GPUs the engines have alone")
    parser.add_argument("--response-tokens", type=int, help="mean; default: a quarter of the limit")
    parser.add_argument("--prompt-tokens", type=int, help="mean and longest; default: 512")
    parser.add_argument("--search", action="store_true", help="also list the fastest layouts")
    parser.add_argument("--build", action="store_true", help="build the ranks on the meta device")
    parser.add_argument("--step", type=int, help="plan the settings of rl.schedule at this step")
    parser.add_argument("--json", type=Path, help="also write everything here")
    return parser


def _job(recipe: Path, chosen: argparse.Namespace, overrides: dict, step: int | None = None) -> Job:
    """Return the job of a recipe with the settings of `step`; default: of --step."""
    config = _config(recipe, overrides).at(step or chosen.step or 1)
    verb = verb_of(config)
    _check_verb(chosen, verb)
    hardware = HARDWARE[chosen.hardware]
    if chosen.memory_gib is not None:
        hardware = replace(hardware, memory=chosen.memory_gib * GIB)
    if chosen.host_memory_gib is not None:
        hardware = replace(hardware, host_memory=chosen.host_memory_gib * GIB)
    rollout, gpus = config.rollout, config.parallel.processes
    if verb == "sample":  # no trainer: the engines' GPUs
        gpus = rollout.engines * rollout.tensor * rollout.data
    hf = read_hf_config(config.model.path, "score" if verb == "reward-model" else "language")
    job = Job(
        hf=hf,
        config=config,
        world_size=chosen.gpus or gpus,
        hardware=hardware,
        assumptions=Assumptions(prompt_tokens=_prompt_tokens(chosen, config, verb, hf)),
        rollout_gpus=chosen.rollout_gpus or 0,
        verb=verb,
    )
    assert job.critic is None or job.critic.is_critic, "reading it checks it"
    limit = job.longest_response
    mean = chosen.response_tokens or max(1, int(limit * job.assumptions.response_share))
    if mean > limit:
        key = "reward_model.max_tokens" if verb == "reward-model" else "rollout.max_response_tokens"
        raise UserError(f"--response-tokens: {mean} is above {key}={limit}; lower it")
    return replace(job, response_tokens=mean)


def _config(recipe: Path, overrides: dict) -> configuration.Config:
    """Load the recipe of one run; raise UserError for other files."""
    if recipe.is_dir():
        raise UserError(f"recipe {recipe} is a folder; name a recipe in it")
    if recipe.is_file() and "\nstages:" in recipe.read_text(encoding="utf-8"):
        raise UserError(f"{recipe} is a pipeline; plan the recipes of its stages")
    config = configuration.load(recipe, overrides, required=("model.path",))
    if config.eval.benchmarks and not (config.data.path or config.data.task):
        raise UserError(
            f"{recipe} is for eval (eval.benchmarks, and neither data.path nor data.task), which "
            "is not planned; plan a recipe of rl, sft, reward-model or sample"
        )
    if config.teacher.path:
        check_teacher(config)
    return config


def _prompt_tokens(
    chosen: argparse.Namespace, config: configuration.Config, verb: Verb, hf: dict
) -> int:
    """Return the option, or 512 if the context has room for it beside the longest response."""
    if verb == "sft":
        return chosen.prompt_tokens or Assumptions.prompt_tokens
    if verb == "reward-model":
        key, room = "reward_model.max_tokens", text_limit(config, hf) - 1
    else:
        key = "rollout.max_model_len"
        room = context_length(config) - config.rollout.max_response_tokens
    if chosen.prompt_tokens is not None and chosen.prompt_tokens > room:
        raise UserError(
            f"--prompt-tokens: {chosen.prompt_tokens} do not fit beside a response, there is room "
            f"for {room}; lower it, or raise {key}"
        )
    return chosen.prompt_tokens or min(Assumptions.prompt_tokens, room)


def _check_options(chosen: argparse.Namespace, rest: list[str]) -> None:
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(chosen).items()}
    del options["--recipes"]
    for word in rest:
        key = word.partition("=")[0]
        near = get_close_matches(key, options, n=1) if "." not in key else []
        if key.startswith("--") and near:
            raise UserError(f"unknown option {key}; did you mean {near[0]}?")
    for option, value in options.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not 0 < value < math.inf:
            raise UserError(f"{option}: {value} is not a finite number above 0")
    if chosen.json and len(chosen.recipes) > 1:
        raise UserError(f"--json: one recipe at a time, {len(chosen.recipes)} are named")


def _check_verb(chosen: argparse.Namespace, verb: Verb) -> None:
    """Raise UserError for options without a meaning for the verb."""
    if verb == "sample" and (chosen.search or chosen.build):
        option = "--search" if chosen.search else "--build"
        raise UserError(f"{option}: sample trains nothing, so there are no trainer's ranks")
    if chosen.rollout_gpus and verb != "rl":
        remedy = "use --gpus" if verb == "sample" else "leave it out"
        have = "has no trainer beside its engines" if verb == "sample" else "has no engines"
        raise UserError(f"--rollout-gpus: {verb} {have}; {remedy}")
