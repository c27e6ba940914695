"""Reads and writes recipes.

A recipe is read from YAML, with settings of the command line (`--section.key value`) over it, and
written with every value resolved."""

import re
from collections.abc import Collection
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.former_keys import drop_removed_keys
from megatron_r1.config.recipe import Config, known_keys
from megatron_r1.config.setting_keys import is_within
from megatron_r1.config.validation_errors import recipe_error
from megatron_r1.config.yaml_text import dump_yaml, read_sections, set_nested

STAGES = re.compile(rb"^stages:", re.MULTILINE)
MISSING_KEY_REMEDIES = {
    "eval.benchmarks": ", such as [gym/arithmetic]; your own: [{name: questions, path: FILE}]",
}
"""What to give for a key that is missing."""


def load_recipe(
    path: str | Path, overrides: dict[str, Any] | None = None, required: tuple[str, ...] = ()
) -> Config:
    """Read a recipe and apply `{"section.key": value}`.

    Args:
        path: the recipe.
        overrides: values by dotted key.
        required: dotted keys that must have a value.

    Raises:
        UserError: naming every mistake."""
    pipeline = UserError(
        f"recipe {path}: it has stages: run it with megatron-r1 pipeline {path}",
        key="stages",
        cause=Cause.CONFLICT,
    )
    try:
        tree = read_sections(Path(path))
    except UserError:
        # The references of a pipeline are not YAML where they stand in braces.
        if Path(path).is_file() and STAGES.search(Path(path).read_bytes()):
            raise pipeline from None
        raise
    if "stages" in tree:
        raise pipeline
    return from_tree(_with_overrides(tree, overrides or {}), str(path), required, overrides or ())


def from_tree(
    tree: dict[str, Any],
    origin: str,
    required: tuple[str, ...] = (),
    overrides: Collection[str] = (),
) -> Config:
    """Build the configuration from a recipe's sections.

    Args:
        tree: sections and their values, as the recipe has them.
        origin: name of the recipe in errors.
        required: keys that must be set.
        overrides: keys that the command line sets.

    Raises:
        UserError: the tree has mistakes; every one is named."""
    config = parse_recipe(tree, origin, overrides)
    missing_keys = [key for key in required if not attrgetter(key)(config)]
    if missing_keys:
        remedy = "".join(MISSING_KEY_REMEDIES.get(key, "") for key in missing_keys)
        raise UserError(
            f"recipe {origin}: {', '.join(missing_keys)} must be set{remedy}",
            key=missing_keys[0],
            cause=Cause.MISSING,
        )
    return config


def from_overrides(overrides: dict[str, Any]) -> Config:
    """Build the configuration of a command without a recipe.

    It has the defaults with `{"section.key": value}` applied.

    Raises:
        UserError: an unknown key, or an invalid value.
    """
    return parse_recipe(_with_overrides({}, overrides), "command line")


def parse_recipe(
    tree: dict[str, Any], origin: str = "config", overrides: Collection[str] = ()
) -> Config:
    """Build the typed configuration from nested sections.

    Args:
        tree: section → key → value.
        origin: where the settings are from, in front of messages.
        overrides: keys that the command line sets.

    Raises:
        UserError: naming each wrong key, its value and the remedy.
    """
    try:
        return Config.model_validate(drop_removed_keys(tree))
    except ValidationError as failure:
        wrong_keys = [".".join(map(str, error["loc"])) for error in failure.errors()]
        if all(key and is_within(key, overrides) for key in wrong_keys):
            origin = "command line"
        raise recipe_error(failure, Config, known_keys(), origin) from None


def dump_recipe(config: Config) -> str:
    """Return the resolved configuration as YAML with every key."""
    return dump_yaml(config.model_dump())


def _with_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for dotted_key, value in overrides.items():
        set_nested(tree, dotted_key.split("."), value, dotted_key)
    return tree
