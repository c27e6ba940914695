"""Parses settings of the command line, `--section.key value`.

Those of a verb's own sections are kept apart from the recipe's."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.keys import dotted_keys
from megatron_r1.config.recipe import known_keys
from megatron_r1.config.section import Section
from megatron_r1.config.validation_errors import recipe_error
from megatron_r1.config.yaml_text import parse_value, set_nested

T = TypeVar("T", bound=Section)


def parse_overrides(
    options: list[str], switches: Collection[str] = (), extra_options: Collection[str] = ()
) -> dict[str, Any]:
    """Parse `--rl.group_size 8 --data.task=sums` to {"rl.group_size": 8, "data.task": "sums"}.

    Values are YAML; a template such as `{question}` is text.

    Args:
        options: the words of the command line.
        switches: keys that become true when no value follows. A value that begins with "--" needs
            the form `--key=value`.
        extra_options: options of the verb that are no settings, for the hint at a mistyped one.

    Raises:
        UserError: for an option without a value or without a section."""
    overrides: dict[str, Any] = {}
    words = list(options)
    known_options = [*switches, *extra_options]
    while words:
        option = words.pop(0)
        if not option.startswith("--"):
            raise UserError(
                f"unexpected argument {option}: settings are --section.key value",
                key=option,
                cause=Cause.UNKNOWN,
            )
        key, equals, value = option[2:].partition("=")
        if not equals:
            has_value = bool(words) and not words[0].startswith("--")
            if not has_value and key in switches:
                overrides[key] = True
                continue
            if not has_value:
                raise UserError(
                    f"--{key} needs a value{did_you_mean(key, known_options, '--{}')}",
                    key=f"--{key}",
                    cause=Cause.MISSING,
                )
            value = words.pop(0)
        if "." not in key:
            # A looser cutoff than elsewhere: `key` is compared with dotted keys, which are longer.
            matches = difflib.get_close_matches(
                key, [*known_options, *known_keys()], n=1, cutoff=0.4
            )
            hint = f"; did you mean --{matches[0]}?" if matches else ""
            raise UserError(
                f"unknown option --{key}: settings are --section.key value{hint}",
                key=f"--{key}",
                cause=Cause.UNKNOWN,
            )
        overrides[key] = _parse_override(value)
    return overrides


def take_section(overrides: Mapping[str, Any], settings: type[T]) -> tuple[T, dict[str, Any]]:
    """Return the settings of a verb that has sections of its own, and the other overrides.

    Args:
        overrides: dotted key → value.
        settings: the model of these sections.

    Raises:
        UserError: naming every mistake.
    """
    tree: dict[str, Any] = {}
    other_overrides = {}
    for key, value in overrides.items():
        if key.partition(".")[0] in settings.model_fields:
            set_nested(tree, key.split("."), value, key)
        else:
            other_overrides[key] = value
    try:
        return settings.model_validate(tree), other_overrides
    except ValidationError as failure:
        known_keys = [key for key, _ in dotted_keys(settings)]
        raise recipe_error(failure, settings, known_keys) from None


def _parse_override(text: str) -> Any:
    try:
        value = parse_value(text) if text else ""
    except yaml.YAMLError:
        return text  # no YAML, such as a template
    # `{question}` is YAML, too: a mapping of a name to nothing, which no setting takes.
    return text if value and isinstance(value, dict) and ":" not in text else value
