"""`python tools/plan RECIPE.yaml [--gpus N] [--json FILE] [--section.key value …]`: the bill before
a GPU is rented.

Parameters, memory of every rank, traffic, operations and time of a recipe's run, each with its
formula, from the tables and settings the run itself uses. A layout that cannot work ends with what
breaks it, the nearest layouts that fit, and exit status 1. `--build` also builds the real ranks of
the layout on torch's meta device and compares every parameter with the plan.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

# In place of this folder, whose file names are not for everyone.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron_r1 import config as configuration  # noqa: E402
from megatron_r1.config.overrides import parse_overrides  # noqa: E402
from megatron_r1.files import atomic_write  # noqa: E402
from megatron_r1.models.hf_config import read_hf_config  # noqa: E402
from megatron_r1.rollout.context import context_length  # noqa: E402
from tools.plan.bill import Bill  # noqa: E402
from tools.plan.hardware import GIB, HARDWARE, Assumptions  # noqa: E402
from tools.plan.job import Job, verb_of  # noqa: E402
from tools.plan.report import as_json, as_text, layouts_text  # noqa: E402
from tools.plan.search import fastest, nearest  # noqa: E402

NEAREST = "nearest layouts that fit (fullest rank, estimated step)"
FASTEST = "fastest layouts that fit (fullest rank, estimated step)"


def main(arguments: list[str] | None = None) -> int:
    """0: it fits; 1: it does not; 2: the recipe or the options are wrong."""
    chosen, rest = _parser().parse_known_args(arguments)
    try:
        job = _job(chosen, parse_overrides(rest))
    except ValueError as error:
        print(f"tools/plan: {error}", file=sys.stderr)
        return 2
    if not _can_work(job):
        return 1
    bill = Bill(job)
    problems = bill.problems()
    print(as_text(bill))
    others = []
    if problems:
        print("\n" + "\n".join(f"does not fit: {problem}" for problem in problems))
        if job.trains:
            others = nearest(job)
            print(layouts_text(job, others, NEAREST))
    elif chosen.search:
        others = fastest(job)
        print("\n" + layouts_text(job, others, FASTEST))
    if chosen.json:
        text = json.dumps(as_json(bill, problems, others), indent=1, default=str)
        atomic_write(chosen.json, text + "\n")
    if chosen.build:
        from tools.plan.build import build_ranks

        print("\n" + build_ranks(job))
    return 1 if problems else 0


def _can_work(job: Job) -> bool:
    """Says what cannot, and which layouts of the trainer can."""
    try:
        if job.generates:
            job.check_engines()
    except ValueError as error:
        print(f"cannot work: {error}")
        return False
    try:
        if job.trains:
            job.check_trainer()
    except ValueError as error:
        print(f"cannot work: {error}")
        print(layouts_text(job, nearest(job), NEAREST))
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--gpus", type=int, help="default: parallel.processes; of sample: engines'")
    parser.add_argument("--hardware", choices=HARDWARE, default="H800")
    parser.add_argument("--memory-gib", type=float, help="of a GPU, instead of the hardware's")
    parser.add_argument("--host-memory-gib", type=float, help="per GPU, instead of 233")
    parser.add_argument("--rollout-gpus", type=int, help="GPUs the engines have alone")
    parser.add_argument("--response-tokens", type=int, help="mean; default: a quarter of the limit")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="mean and longest prompt")
    parser.add_argument("--search", action="store_true", help="also list the fastest layouts")
    parser.add_argument("--build", action="store_true", help="build the ranks on the meta device")
    parser.add_argument("--json", type=Path, help="also write everything here")
    return parser


def _job(chosen: argparse.Namespace, overrides: dict) -> Job:
    if chosen.recipe.is_file() and "\nstages:" in chosen.recipe.read_text(encoding="utf-8"):
        raise ValueError(f"{chosen.recipe} is a pipeline; plan the recipes of its stages")
    config = configuration.load(chosen.recipe, overrides, required=("model.path",))
    hardware = HARDWARE[chosen.hardware]
    _check_positive(chosen)
    verb = verb_of(config)
    if verb == "sample" and (chosen.search or chosen.build):
        option = "--search" if chosen.search else "--build"
        raise ValueError(f"{option}: sample trains nothing, so there are no trainer's ranks")
    if verb in ("rl", "sample"):
        context_length(config)
    if chosen.memory_gib is not None:
        hardware = replace(hardware, memory=chosen.memory_gib * GIB)
    if chosen.host_memory_gib is not None:
        hardware = replace(hardware, host_memory=chosen.host_memory_gib * GIB)
    head = "score" if verb == "reward-model" else "language"
    job = Job(
        hf=read_hf_config(config.model.path, head),
        config=config,
        world_size=chosen.gpus or _gpus(config, verb),
        hardware=hardware,
        assumptions=Assumptions(prompt_tokens=chosen.prompt_tokens),
        rollout_gpus=chosen.rollout_gpus or 0,
        verb=verb,
    )
    limit = job.longest_response
    mean = chosen.response_tokens or max(1, limit // 4)
    if mean > limit:
        key = "reward_model.max_tokens" if verb == "reward-model" else "rollout.max_response_tokens"
        raise ValueError(f"--response-tokens: {mean} is above {key}={limit}; lower it")
    return replace(job, response_tokens=mean)


def _gpus(config: configuration.Config, verb: str) -> int:
    """Of the trainer; of the engines, where there is no trainer."""
    rollout = config.rollout
    if verb == "sample":
        return rollout.engines * rollout.tensor * rollout.data
    return config.parallel.processes


def _check_positive(chosen: argparse.Namespace) -> None:
    names = "gpus memory_gib host_memory_gib rollout_gpus response_tokens prompt_tokens"
    for name in names.split():
        value = getattr(chosen, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not above 0")


if __name__ == "__main__":
    sys.exit(main())
