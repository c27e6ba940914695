"""Splits the command line of a verb without a recipe into arguments and options."""

from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.commands.verb_module import VerbModule


def split_verb_words(
    verb: str, module: VerbModule, words: list[str]
) -> tuple[list[str], list[str]]:
    """Return a verb's arguments, and the options after them.

    Args:
        verb: its name, for errors.
        module: its module, which has the arguments' names.
        words: the command line after the verb.

    Raises:
        UserError: an argument is missing."""
    option_names = {text.partition("=")[0] for text in words}
    is_instead = not option_names.isdisjoint(f"--{name}" for name in module.alternative_options)
    count = 0 if is_instead else len(module.arguments)
    values, options = words[:count], words[count:]
    if len(values) < count or any(value.startswith("--") for value in values):
        num_arguments = next(
            (index for index, value in enumerate(values) if value[:2] == "--"), len(values)
        )
        usage = f"usage: megatron-r1 {verb} {' '.join(module.arguments)} [--key value …]"
        raise UserError(
            f"{module.arguments[num_arguments]} is missing; {usage}",
            key=module.arguments[num_arguments],
            cause=Cause.MISSING,
        )
    return values, options


def read_verb_options(module: VerbModule, options: list[str]) -> dict[str, Any]:
    """Remove the verb's own options from `options`, and return them by name.

    Raises:
        UserError: an option is given twice that is read once."""
    values_by_option = {name: _take_options(name, options) for name in module.options}
    verb_options: dict[str, Any] = {}
    for name, texts in values_by_option.items():
        if name in module.repeated_options and texts:
            verb_options[name] = texts
        elif len(texts) > 1:
            raise UserError(
                f"--{name} is given {len(texts)} times; give it once",
                key=f"--{name}",
                cause=Cause.DUPLICATE,
            )
        elif texts:
            verb_options[name] = texts[0]
    return verb_options


def refuse_unknown_options(verb: str, module: VerbModule, options: list[str]) -> None:
    """Raise UserError for an option that is neither the verb's nor a setting.

    Args:
        verb: its name, for errors.
        module: its module, which has the options' names.
        options: the command line after the arguments."""
    known_options = [f"--{name}" for name in module.options]
    for option in options:
        name = option.partition("=")[0]
        if (
            name.startswith("--")
            and "." not in name
            and name[2:] not in configuration.Config.model_fields
        ):
            known_text = f"; {verb} has {', '.join(known_options)}" if known_options else ""
            raise UserError(
                f"unknown option {name}{did_you_mean(name, known_options, '{}') or known_text}",
                key=name,
                cause=Cause.UNKNOWN,
            )


def _take_options(name: str, options: list[str]) -> list[str]:
    """Remove each `--name VALUE` or `--name=VALUE` from `options` and return the values.

    Raises:
        UserError: an option has no value.
    """
    values = []
    while positions := [
        position for position, text in enumerate(options) if text.partition("=")[0] == f"--{name}"
    ]:
        position = positions[0]
        _, has_value, value = options.pop(position).partition("=")
        if not has_value:
            if position == len(options) or options[position].startswith("--"):
                raise UserError(f"--{name} needs a value", key=f"--{name}", cause=Cause.MISSING)
            value = options.pop(position)
        values.append(value)
    return values
