"""Reads a recipe from YAML, with settings of the command line over it; writes the resolved one."""

from collections.abc import Collection
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_r1.config.differences import is_within
from megatron_r1.config.mistakes import explain
from megatron_r1.config.recipe import Config, known_keys
from megatron_r1.config.yaml_text import put, read_sections
from megatron_r1.errors import UserError

REMEDIES = {
    "eval.benchmarks": ", such as [gym/arithmetic]; your own: [{name: questions, path: FILE}]",
}
"""What to give for a key that is missing."""


def load(
    path: str | Path, overrides: dict[str, Any] | None = None, required: tuple[str, ...] = ()
) -> Config:
    """Read a recipe and apply `{"section.key": value}`.

    required: dotted keys that must have a value. Raises UserError naming every mistake."""
    tree = read_sections(Path(path))
    if "stages" in tree:
        raise UserError(f"recipe {path}: it has stages: run it with megatron-r1 pipeline {path}")
    return from_tree(_with_overrides(tree, overrides or {}), str(path), required, overrides or ())


def from_tree(
    tree: dict[str, Any],
    origin: str,
    required: tuple[str, ...] = (),
    given: Collection[str] = (),
) -> Config:
    """Build the configuration from a recipe's sections.

    origin: name of the recipe in errors. given: keys that the command line sets. Raises UserError
    naming every mistake."""
    config = parse(tree, origin, given)
    missing = [key for key in required if not attrgetter(key)(config)]
    if missing:
        remedy = "".join(REMEDIES.get(key, "") for key in missing)
        raise UserError(f"recipe {origin}: {', '.join(missing)} must be set{remedy}")
    return config


def from_overrides(overrides: dict[str, Any]) -> Config:
    """Build the configuration of a command without a recipe: the defaults with
    `{"section.key": value}` applied. Raises UserError."""
    return parse(_with_overrides({}, overrides), "command line")


def parse(tree: dict[str, Any], origin: str = "config", given: Collection[str] = ()) -> Config:
    """Build the typed configuration from nested sections. given: keys that the command line sets.
    Raises UserError naming each wrong key, its value and the remedy."""
    try:
        return Config.model_validate(tree)
    except ValidationError as failure:
        wrong = [".".join(map(str, error["loc"])) for error in failure.errors()]
        if all(key and is_within(key, given) for key in wrong):
            origin = "command line"
        raise UserError(f"{origin}: {explain(failure, Config, known_keys())}") from None


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML with every key."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _with_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for dotted, value in overrides.items():
        put(tree, dotted.split("."), value, dotted)
    return tree
