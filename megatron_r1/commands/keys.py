"""Prints the keys of recipes with defaults and meanings.

megatron-r1 keys                  all
megatron-r1 keys rollout rl.loss  sections and keys
megatron-r1 keys num_generations  what other libraries' settings are called here, and keys with
                                  the word in their name or meaning"""

from collections.abc import Sequence

from megatron_r1.config import Config
from megatron_r1.config.keys import describe_keys
from megatron_r1.pipeline.pipeline_recipe import PipelineRecipe
from megatron_r1.rehearse.settings import PreflightRecipe, RehearsalRecipe


def describe_all_keys(names: Sequence[str]) -> str:
    """Return the keys of all kinds of recipes with their types and defaults.

    Args:
        names: sections or keys; none: all.

    Raises:
        UserError: for an unknown name."""
    return describe_keys((Config, PipelineRecipe, RehearsalRecipe, PreflightRecipe), names)
