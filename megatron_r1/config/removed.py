"""Keys that recipes had in earlier versions, and what to do instead.

A run's `config.yaml` has every key of the version that wrote it. So a removed key at its former
default means nothing and is left out; with another value it is refused."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class RemovedKey(NamedTuple):
    """A key that is not one any more: its former default, and the remedy in an error."""

    default: Any
    remedy: str


WHOLE_PUSHES = "a push always sends all weights; leave it out"

REMOVED = {
    "push.delta": RemovedKey(False, WHOLE_PUSHES),
    "push.full_every": RemovedKey(50, WHOLE_PUSHES),
    "push.memory_gib": RemovedKey(
        None,
        "an engine rank receives all of its weights at once; leave it out, and where they do not "
        "fit beside the engine lower rollout.gpu_memory, give each engine more GPUs "
        "(rollout.tensor), or set push.transport: gloo, which receives in host memory",
    ),
}
"""Removed keys by dotted name."""


def without_removed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a recipe without removed keys that have their former default."""
    return {
        section: {key: value for key, value in keys.items() if not _is_void(section, key, value)}
        if isinstance(keys, Mapping)
        else keys
        for section, keys in tree.items()
    }


def _is_void(section: str, key: str, value: Any) -> bool:
    removed = REMOVED.get(f"{section}.{key}")
    return removed is not None and value == removed.default
