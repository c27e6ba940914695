"""Mistakes in a recipe as sentences that name the key, its value and the remedy."""

from collections.abc import Iterable, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.former_keys import FORMER_VALUES, find_removed_key
from megatron_r1.config.key_aliases import find_aliases
from megatron_r1.config.keys import nested_models

GREEDY = ("rollout.temperature", "eval.temperature")
MIN_WORD_LENGTH = 5
"""Characters of a part of a key that is searched for in others: `max` and `num` are in many."""


CAUSE_BY_TYPE = {
    "missing": Cause.MISSING,
    **dict.fromkeys(("extra_forbidden", "literal_error", "enum"), Cause.UNKNOWN),
    **dict.fromkeys(("too_short", "string_too_short"), Cause.EMPTY),
    **dict.fromkeys(
        ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"),
        Cause.OUT_OF_RANGE,
    ),
}
"""What pydantic's types of errors are to a user; any other is a malformed value."""


def recipe_error(
    failure: ValidationError,
    root: type[BaseModel],
    known_keys: Iterable[str] = (),
    origin: str = "",
) -> UserError:
    """Return the error that names all mistakes of validating a `root`.

    Its key and cause are those of the first.

    Args:
        failure: pydantic's.
        root: the model that was validated.
        known_keys: as in `_explain_failure`.
        origin: where the settings are from, in front of the message.
    """
    first = failure.errors()[0]
    key = ".".join(map(str, first["loc"]))
    cause = CAUSE_BY_TYPE.get(first["type"], Cause.MALFORMED)
    if first["type"] == "value_error" and isinstance(error := first["ctx"]["error"], UserError):
        # A model that others hold does not know where: its keys are relative to it.
        if not key or error.key.split(".")[0] == str(first["loc"][0]):
            key = error.key
        elif error.key != str(first["loc"][-1]):
            key = f"{key}.{error.key}".removesuffix(".")
        cause = error.cause
    message = f"{origin}: " if origin else ""
    return UserError(message + _explain_failure(failure, root, known_keys), key=key, cause=cause)


def _explain_failure(
    failure: ValidationError, root: type[BaseModel], known_keys: Iterable[str] = ()
) -> str:
    """Return all errors of a validation.

    Args:
        failure: the validation's error.
        root: the model that was validated.
        known_keys: dotted keys to suggest for a key that stands in the wrong section."""
    return "; ".join(_describe_mistake(error, root, known_keys) for error in failure.errors())


def _describe_mistake(
    error: Mapping[str, Any], root: type[BaseModel], known_keys: Iterable[str]
) -> str:
    location = error["loc"]
    key = ".".join(map(str, location))
    removed_key = find_removed_key(key)
    if error["type"] == "extra_forbidden" and removed_key:
        return f"{key} was removed (it is {error.get('input')!r}): {removed_key.remedy}"
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_unknown_key_hint(location, root, known_keys)}"
    if error["type"] == "missing":
        return f"{key} must be set"
    if error["type"] in ("model_type", "dict_type"):
        return f"{key}: it has keys below it, as {key}.KEY, got {error.get('input')!r}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return message if message.startswith(key) else f"{key}: {message}"
    remedy = ""
    if error["type"] == "string_type" and isinstance(error.get("input"), dict | list):
        remedy = (
            "; YAML takes that for more than a text: put it in double quotes, within the shell's"
        )
    if error["type"] == "list_type" and isinstance(error.get("input"), str):
        remedy = f"; in brackets: [{error['input']}]"
    if error["type"] == "literal_error" and (name := FORMER_VALUES.get((key, str(error["input"])))):
        remedy = f"; it is called {name}"
    if error["type"] == "greater_than" and key in GREEDY:
        remedy = "; 0.01 decodes nearly greedily, by the likeliest token"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error.get('input')!r}{remedy}"


def _unknown_key_hint(
    location: tuple[str | int, ...], root: type[BaseModel], known_keys: Iterable[str]
) -> str:
    """Return what an unknown key may mean: it is misspelt, or stands in the wrong section."""
    *parents, leaf = map(str, location)
    keys = _keys_at(location[:-1], root)
    prefix = "".join(f"{parent}." for parent in parents).replace("{", "{{").replace("}", "}}")
    if suggestion := did_you_mean(leaf, keys, prefix + "{}"):
        return suggestion
    if other_keys := [key for key in known_keys if key.rpartition(".")[2] == leaf]:
        return f"; did you mean {other_keys[0]}?"
    if aliases := find_aliases(leaf, exact=True):
        return f"; elsewhere {leaf} is what is {' and '.join(aliases[0].keys)} here"
    words = {word for word in leaf.split("_") if len(word) >= MIN_WORD_LENGTH}
    similar_keys = [key for key in keys if words & set(key.split("_"))]
    if len(similar_keys) == 1:
        return f"; did you mean {'.'.join([*parents, similar_keys[0]])}?"
    return f"; {'.'.join(parents) or 'a recipe'} has {', '.join(keys)}"


def _keys_at(location: tuple[str | int, ...], root: type[BaseModel]) -> list[str]:
    """Return the keys of the model at `location`, such as ("eval", "benchmarks", 1)."""
    annotation: Any = root
    for part in location:
        model = next(nested_models(annotation))[0]
        is_entry = get_origin(annotation) in (list, dict)
        annotation = model if is_entry else model.model_fields[str(part)].annotation
    return list(next(nested_models(annotation))[0].model_fields)
