"""Reads the command line of megatron-r1 plan: its options, and the settings of the recipe."""

import argparse
import math
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.keys import boolean_keys
from megatron_r1.config.overrides import parse_overrides
from megatron_r1.plan.hardware import HARDWARE


def parse_job_arguments(
    arguments: list[str], description: str | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the options and the recipe's overrides.

    Raises:
        UserError: an argument is neither.
    """
    settings, option_words = _split_off_settings(arguments)
    args, override_words = _build_parser(description).parse_known_args(option_words)
    _check_options(args, override_words)
    return args, parse_overrides([*override_words, *settings], boolean_keys(configuration.Config))


def _split_off_settings(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of the recipe's settings (`--section.key value`) and all others.

    argparse would take a setting's value, and any word with a blank in it, for a recipe."""
    settings: list[str] = []
    option_words: list[str] = []
    needs_value = False
    for word in arguments:
        key, equals, _ = word.partition("=")
        if word.startswith("--") and "." in key:
            settings.append(word)
            needs_value = not equals
        else:
            is_value = needs_value and not word.startswith("--")
            (settings if is_value else option_words).append(word)
            needs_value = False
    return settings, option_words


def _build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-r1 plan",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("recipes", type=Path, nargs="*", metavar="recipe")
    parser.add_argument("--gpus", type=int, help="default: parallel.processes; of sample: engines'")
    parser.add_argument("--hardware", choices=HARDWARE, default="H800")
    parser.add_argument("--memory-gib", type=float, help="of a GPU, instead of the hardware's")
    parser.add_argument("--host-memory-gib", type=float, help="per GPU, instead of 233")
    parser.add_argument(
        "--rollout-gpus",
        type=int,
        help="GPUs the engines have alone; default: of a recipe's engine hosts",
    )
    parser.add_argument("--response-tokens", type=int, help="mean; default: a quarter of the limit")
    parser.add_argument("--prompt-tokens", type=int, help="mean and longest; default: 512")
    parser.add_argument("--search", action="store_true", help="also list the fastest layouts")
    parser.add_argument("--build", action="store_true", help="build the ranks on the meta device")
    parser.add_argument("--step", type=int, help="plan the settings of rl.schedule at this step")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measured values in place of assumed ones"
    )
    parser.add_argument(
        "--calibrate-from",
        type=Path,
        nargs=2,
        metavar=("RUN_FOLDER", "FILE"),
        help="derive such a file from a run, instead of planning",
    )
    parser.add_argument(
        "--published", action="store_true", help="compare with published runs, instead of planning"
    )
    parser.add_argument("--json", type=Path, help="also write everything here")
    return parser


def _check_options(args: argparse.Namespace, override_words: list[str]) -> None:
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    recipes = options.pop("--recipes")
    if bool(recipes) == bool(args.published or args.calibrate_from):
        raise UserError(
            "name a recipe, or one of --published and --calibrate-from RUN_FOLDER FILE without one",
            key="recipe",
            cause=Cause.CONFLICT if recipes else Cause.MISSING,
        )
    for word in override_words:
        key = word.partition("=")[0]
        suggestion = did_you_mean(key, options, "{}")
        if key.startswith("--") and suggestion:
            raise UserError(f"unknown option {key}{suggestion}", key=key, cause=Cause.UNKNOWN)
    for option, value in options.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not 0 < value < math.inf:
            raise UserError(
                f"{option}: {value} is not a finite number above 0",
                key=option,
                cause=Cause.OUT_OF_RANGE,
            )
    if args.json and len(args.recipes) > 1:
        raise UserError(
            f"--json: one recipe at a time, {len(args.recipes)} are named",
            key="--json",
            cause=Cause.CONFLICT,
        )
