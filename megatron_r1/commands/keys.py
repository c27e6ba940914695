"""The keys of all recipes: `megatron-r1 keys [SECTION …]`."""

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
