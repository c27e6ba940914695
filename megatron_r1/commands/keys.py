"""Prints the keys of recipes with defaults and meanings.

megatron-r1 keys                  all
megatron-r1 keys rollout rl.loss  sections and keys
megatron-r1 keys num_generations  what other libraries' settings are called here, and keys with
                                  the word in their name or meaning"""

import argparse
from collections.abc import Sequence

from megatron_r1.config import Config
from megatron_r1.config.keys import describe_keys
from megatron_r1.pipeline.pipeline_recipe import PipelineRecipe
from megatron_r1.rehearse.settings import PreflightRecipe, RehearsalRecipe


def main(arguments: Sequence[str]) -> int:
    """Print the keys that the arguments name; return the exit status.

    Raises:
        UserError: for an unknown name."""
    parser = argparse.ArgumentParser(
        prog="megatron-r1 keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a section, a key or a word")
    options, unknown_names = parser.parse_known_args(arguments)
    print(describe_all_keys([*options.names, *unknown_names]))
    return 0


def describe_all_keys(names: Sequence[str]) -> str:
    """Return the keys of all kinds of recipes with their types and defaults.

    Args:
        names: sections or keys; none: all.

    Raises:
        UserError: for an unknown name."""
    return describe_keys((Config, PipelineRecipe, RehearsalRecipe, PreflightRecipe), names)
