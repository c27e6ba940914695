"""Makes the job that a recipe and the options of megatron-r1 plan describe."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Verb, infer_verb
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.calibration_file import apply_calibration
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.plan.job import Calibration, PlannedJob, text_limit
from megatron_r1.plan.teacher import check_planned_teachers


def planned_job(
    recipe: Path, args: argparse.Namespace, overrides: dict[str, Any], step: int | None = None
) -> PlannedJob:
    """Return the job of a recipe with the settings of one step.

    Args:
        recipe: the recipe's file.
        args: the options of the command line.
        overrides: dotted settings in place of the recipe's.
        step: the training step, from 1; None: that of --step.

    Raises:
        UserError: the recipe, the options or the model do not go together."""
    loaded_config = load_planned_recipe(recipe, overrides)
    config = loaded_config.at(step or args.step or 1)
    verb = infer_verb(config)
    _check_verb(args, verb)
    hardware, assumptions = HARDWARE[args.hardware], Assumptions()
    calibration = Calibration()
    if args.calibrate:
        hardware, assumptions, calibration = apply_calibration(
            hardware, assumptions, args.calibrate
        )
    if args.memory_gib is not None:
        hardware = replace(hardware, memory=args.memory_gib * GIB)
    if args.host_memory_gib is not None:
        hardware = replace(hardware, host_memory=args.host_memory_gib * GIB)
    rollout, gpus = config.rollout, config.parallel.processes
    if verb == "sample":  # no trainer: the engines' GPUs
        gpus = rollout.engines * rollout.tensor_parallel * rollout.data_parallel
    hf_config = read_hf_config(config.model.path, "score" if verb == "reward-model" else "language")
    prompt = _prompt_tokens(args, config, verb, hf_config, assumptions.prompt_tokens)
    job = PlannedJob(
        hf_config=hf_config,
        config=config,
        world_size=args.gpus or gpus,
        hardware=hardware,
        assumptions=replace(assumptions, prompt_tokens=prompt),
        calibration=calibration,
        rollout_gpus=args.rollout_gpus or _gpus_of_hosts(config, verb),
        verb=verb,
        keeps_reference=verb == "rl" and loaded_config.uses_reference,
    )
    assert job.critic is None or job.critic.is_critic, "reading it checks it"
    limit = job.max_response_tokens
    mean = args.response_tokens or max(1, int(limit * job.assumptions.response_fraction))
    if mean > limit:
        key = "reward_model.max_tokens" if verb == "reward-model" else "rollout.max_response_tokens"
        raise UserError(
            f"--response-tokens: {mean} is above {key}={limit}; lower it",
            key="--response-tokens",
            cause=Cause.TOO_LARGE,
        )
    return replace(job, response_tokens=mean)


def load_planned_recipe(recipe: Path, overrides: dict[str, Any]) -> configuration.Config:
    """Load the recipe of one run.

    Raises:
        UserError: the file is not such a recipe.
    """
    if recipe.is_dir():
        raise UserError(
            f"recipe {recipe} is a folder; name a recipe in it", key="recipe", cause=Cause.NOT_FOUND
        )
    if recipe.is_file() and "\nstages:" in recipe.read_text(encoding="utf-8"):
        raise UserError(
            f"{recipe} is a pipeline; plan the recipes of its stages",
            key="recipe",
            cause=Cause.UNSUPPORTED,
        )
    config = configuration.load_recipe(recipe, overrides, required=("model.path",))
    if config.eval.benchmarks and not (config.data.path or config.data.task):
        raise UserError(
            f"{recipe} is for eval (eval.benchmarks, and neither data.path nor data.task), which "
            "is not planned; plan a recipe of rl, sft, reward-model or sample",
            key="eval.benchmarks",
            cause=Cause.UNSUPPORTED,
        )
    check_planned_teachers(config)
    return config


def _gpus_of_hosts(config: configuration.Config, verb: Verb) -> int:
    """Return the GPUs of engine hosts that are not the trainer's, 0 where there are none or the
    recipe does not say how many."""
    rollout = config.rollout
    ranks = rollout.tensor_parallel * rollout.data_parallel
    has_own_gpus = verb == "rl" and rollout.placement == "hosts" and not rollout.colocated
    return rollout.engines * ranks if has_own_gpus and ranks > 1 else 0


def _prompt_tokens(
    args: argparse.Namespace,
    config: configuration.Config,
    verb: Verb,
    hf_config: HFConfig,
    assumed_tokens: int,
) -> int:
    """Return the option, or the assumed ones if the context has room for them next to the longest
    response.

    Args:
        args: the options.
        config: the recipe.
        verb: the verb that runs the recipe.
        hf_config: the model's `config.json`.
        assumed_tokens: those of a prompt where no option says."""
    if verb == "sft":
        return args.prompt_tokens or assumed_tokens
    if verb == "reward-model":
        key, longest_prompt = "reward_model.max_tokens", text_limit(config, hf_config) - 1
    else:
        key = "rollout.max_model_len"
        longest_prompt = max_model_len(config) - config.rollout.max_response_tokens
    if args.prompt_tokens is not None and args.prompt_tokens > longest_prompt:
        raise UserError(
            f"--prompt-tokens: {args.prompt_tokens} do not fit next to a response, at most "
            f"{longest_prompt} do; lower it, or raise {key}",
            key="--prompt-tokens",
            cause=Cause.TOO_LARGE,
        )
    return args.prompt_tokens or min(assumed_tokens, longest_prompt)


def _check_verb(args: argparse.Namespace, verb: Verb) -> None:
    """Raise UserError for options without a meaning for the verb."""
    if verb == "sample" and (args.search or args.build):
        option = "--search" if args.search else "--build"
        raise UserError(
            f"{option}: sample trains nothing, so there are no trainer's ranks",
            key=option,
            cause=Cause.CONFLICT,
        )
    if args.rollout_gpus and verb != "rl":
        remedy = "use --gpus" if verb == "sample" else "leave it out"
        reason = "has no trainer next to its engines" if verb == "sample" else "has no engines"
        raise UserError(
            f"--rollout-gpus: {verb} {reason}; {remedy}", key="--rollout-gpus", cause=Cause.CONFLICT
        )
