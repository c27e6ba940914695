"""Reads a recipe from YAML, with settings of the command line (`--section.key value`) over it;
writes the resolved one."""

import difflib
import re
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.differences import is_within
from megatron_r1.config.keys import keys_of
from megatron_r1.config.mistakes import refusal
from megatron_r1.config.recipe import Config, known_keys
from megatron_r1.config.removed import without_removed
from megatron_r1.config.section import Section
from megatron_r1.config.yaml_text import as_yaml, parse_text, put, read_sections

T = TypeVar("T", bound=Section)
STAGES = re.compile(rb"^stages:", re.MULTILINE)

REMEDIES = {
    "eval.benchmarks": ", such as [gym/arithmetic]; your own: [{name: questions, path: FILE}]",
}
"""What to give for a key that is missing."""


def load(
    path: str | Path, overrides: dict[str, Any] | None = None, required: tuple[str, ...] = ()
) -> Config:
    """Read a recipe and apply `{"section.key": value}`.

    required: dotted keys that must have a value. Raises UserError naming every mistake."""
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
    given: Collection[str] = (),
) -> Config:
    """Build the configuration from a recipe's sections.

    origin: name of the recipe in errors. given: keys that the command line sets. Raises UserError
    naming every mistake."""
    config = parse(tree, origin, given)
    missing = [key for key in required if not attrgetter(key)(config)]
    if missing:
        remedy = "".join(REMEDIES.get(key, "") for key in missing)
        raise UserError(
            f"recipe {origin}: {', '.join(missing)} must be set{remedy}",
            key=missing[0],
            cause=Cause.MISSING,
        )
    return config


def from_overrides(overrides: dict[str, Any]) -> Config:
    """Build the configuration of a command without a recipe: the defaults with
    `{"section.key": value}` applied. Raises UserError."""
    return parse(_with_overrides({}, overrides), "command line")


def parse(tree: dict[str, Any], origin: str = "config", given: Collection[str] = ()) -> Config:
    """Build the typed configuration from nested sections. given: keys that the command line sets.
    Raises UserError naming each wrong key, its value and the remedy."""
    try:
        return Config.model_validate(without_removed(tree))
    except ValidationError as failure:
        wrong = [".".join(map(str, error["loc"])) for error in failure.errors()]
        if all(key and is_within(key, given) for key in wrong):
            origin = "command line"
        raise refusal(failure, Config, known_keys(), origin) from None


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML with every key."""
    return as_yaml(config.model_dump())


def parse_overrides(options: list[str], switches: Collection[str] = ()) -> dict[str, Any]:
    """Parse `--rl.group_size 8 --data.task=sums` to {"rl.group_size": 8, "data.task": "sums"}.

    Values are YAML; a template such as `{problem}` is text. switches: keys that become true when no
    value follows. A value that begins with "--" needs the form `--key=value`. Raises UserError for
    an option without a value or without a section."""
    overrides: dict[str, Any] = {}
    pending = list(options)
    known = [*switches, "dry-run"]  # an option of rl that is no setting
    while pending:
        option = pending.pop(0)
        if not option.startswith("--"):
            raise UserError(
                f"unexpected argument {option}: settings are --section.key value",
                key=option,
                cause=Cause.UNKNOWN,
            )
        key, equals, value = option[2:].partition("=")
        if not equals:
            has_value = bool(pending) and not pending[0].startswith("--")
            if not has_value and key in switches:
                overrides[key] = True
                continue
            if not has_value:
                raise UserError(
                    f"--{key} needs a value{did_you_mean(key, known, '--{}')}",
                    key=f"--{key}",
                    cause=Cause.MISSING,
                )
            value = pending.pop(0)
        if "." not in key:
            # A looser cutoff than elsewhere: `key` is compared with dotted keys, which are longer.
            near = difflib.get_close_matches(key, [*known, *known_keys()], n=1, cutoff=0.4)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise UserError(
                f"unknown option --{key}: settings are --section.key value{hint}",
                key=f"--{key}",
                cause=Cause.UNKNOWN,
            )
        overrides[key] = _value(value)
    return overrides


def take_section(overrides: Mapping[str, Any], settings: type[T]) -> tuple[T, dict[str, Any]]:
    """Return the settings of a verb that has sections of its own, and the other overrides.

    settings: the model of these sections. Raises UserError naming every mistake."""
    tree: dict[str, Any] = {}
    others = {}
    for key, value in overrides.items():
        if key.partition(".")[0] in settings.model_fields:
            put(tree, key.split("."), value, key)
        else:
            others[key] = value
    try:
        return settings.model_validate(tree), others
    except ValidationError as failure:
        known = [key for key, _ in keys_of(settings)]
        raise refusal(failure, settings, known) from None


def _with_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for dotted, value in overrides.items():
        put(tree, dotted.split("."), value, dotted)
    return tree


def _value(text: str) -> Any:
    try:
        value = parse_text(text) if text else ""
    except yaml.YAMLError:
        return text  # no YAML, such as a template
    # `{problem}` is YAML, too: a mapping of a name to nothing, which no setting takes.
    return text if value and isinstance(value, dict) and ":" not in text else value
