"""Items of reasoning-gym's tasks in JSON types, and the parameters of a level of a task."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean


def generate_items(
    task: str, parameters: dict[str, Any], seed: int, num_items: int
) -> Iterator[dict[str, Any]]:
    """Yield the items 0 … num_items - 1 of a reasoning-gym dataset, generated one by one.

    An item has question: str, answer: str or None, metadata: dict, in JSON types. For most tasks
    item i of seed s is item 0 of seed s + i: neighboring seeds share nearly all questions.

    Args:
        task: its name in reasoning-gym.
        parameters: the task's parameters.
        seed: the seed of its first item.
        num_items: how many.

    Raises:
        UserError: for an unknown task or parameter and for values the task refuses.
    """
    dataset = _make_dataset(task, {**parameters, "seed": seed, "size": num_items})
    for index in range(num_items):
        with contextlib.redirect_stdout(io.StringIO()):  # some tasks print while they search
            item = _to_json_types(dataset[index])
        yield item


def level_parameters(task: str, level: int) -> dict[str, Any]:
    """Return the parameters of a task at a level of its reasoning-gym curriculum, 0 the easiest. A
    setting with fewer levels stays at its last.

    Args:
        task: its name in reasoning-gym.
        level: from 0.

    Raises:
        UserError: for a task without curriculum.
    """
    from reasoning_gym.factory import CURRICULA

    if task not in CURRICULA:
        raise UserError(
            f"reasoning-gym has no levels for task {task!r}: give its parameters",
            key="data.parameters",
            cause=Cause.MISSING,
        )
    curriculum = CURRICULA[task]()
    curriculum.set_global_level(level)
    settings = dataclasses.asdict(curriculum.generate_configuration({}))
    return {name: value for name, value in settings.items() if name not in ("seed", "size")}


def _make_dataset(task: str, settings: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        hint = did_you_mean(task, DATASETS) or f"; it has {', '.join(sorted(DATASETS))}"
        raise UserError(
            f"reasoning-gym has no task {task!r}{hint}", key="data.task", cause=Cause.UNKNOWN
        )
    known_fields = {field.name for field in dataclasses.fields(DATASETS[task][1])}
    if unknown_fields := sorted(settings.keys() - known_fields):
        raise UserError(
            f"task {task!r} has no parameter {unknown_fields[0]!r}; it has "
            f"{', '.join(sorted(known_fields))}",
            key=f"data.parameters.{unknown_fields[0]}",
            cause=Cause.UNKNOWN,
        )
    try:
        return reasoning_gym.create_dataset(task, **settings)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"task {task!r} refuses its parameters {settings}: {error}",
            key="data.parameters",
            cause=Cause.OUT_OF_RANGE,
        ) from error


def _to_json_types(value: Any) -> Any:
    """Return `value` in JSON types: items of some tasks hold tuples, sets and numpy scalars."""
    if isinstance(value, dict):
        return {_to_json_types(key): _to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_to_json_types(item) for item in value), key=repr)
    if value is None or isinstance(value, bool):
        return value
    for plain_type in (str, int, float):
        if isinstance(value, plain_type):
            return plain_type(value)
    if hasattr(value, "tolist"):
        return _to_json_types(value.tolist())
    return str(value)
