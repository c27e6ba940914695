"""Keys and values that recipes had in earlier versions, and what replaces each.

A run's `config.yaml` has every key of the version that wrote it. So a removed key at its former
default means nothing and is left out; with another value it is refused."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megatron_r1.base.errors import Cause, UserError


class RemovedKey(NamedTuple):
    """A key that is not one any more: its former default, and the remedy in an error."""

    default: Any
    remedy: str


WHOLE_PUSHES = "a push always sends all weights; leave it out"
REMOVED_KEYS = {
    "push.delta": RemovedKey(False, WHOLE_PUSHES),
    "push.full_every": RemovedKey(50, WHOLE_PUSHES),
    "push.memory_gib": RemovedKey(
        None,
        "an engine rank receives all of its weights at once; leave it out, and where they do not "
        "fit next to the engine lower rollout.gpu_memory, give each engine more GPUs "
        "(rollout.tensor_parallel), or set push.transport: gloo, which receives in host memory",
    ),
    "optimizer.warmup": RemovedKey(0, "it is called optimizer.warmup_updates"),
    "parallel.wait_seconds": RemovedKey(7200.0, "it is called parallel.timeout_seconds"),
    "rl.questions_per_rollout": RemovedKey(512, "it is called rl.prompts_per_rollout"),
    "rewards.answer": RemovedKey("strict", "it is called rewards.reading"),
    "sample.avoid": RemovedKey([], "it is called sample.decontaminate"),
    "sample.avoid_ngram": RemovedKey(13, "it is called sample.decontaminate_ngram"),
    "teacher.tokens_at_once": RemovedKey(2048, "it is called teacher.max_num_batched_tokens"),
} | {
    f"{section}.{axis}": RemovedKey(1, f"it is called {section}.{axis}_parallel")
    for section in ("rollout", "teacher")
    for axis in ("tensor", "pipeline", "data")
}
"""Removed keys by dotted name."""
FORMER_VALUES = {("sample.output", "answers"): "responses"}
"""The name that a value has now, by key and former name."""


def find_removed_key(key: str) -> RemovedKey | None:
    """Return what is known of a removed key.

    Args:
        key: a dotted key. Keys of `teacher.by_source.SOURCE` are those of `teacher`."""
    section, _, leaf = key.rpartition(".")
    if not section.startswith("teacher.by_source."):
        return REMOVED_KEYS.get(key)
    removed_key = REMOVED_KEYS.get(f"teacher.{leaf}")
    return removed_key and removed_key._replace(
        remedy=removed_key.remedy.replace("teacher.", f"{section}.")
    )


def drop_removed_keys(tree: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return a recipe's settings without removed keys that have their former default.

    Args:
        tree: the settings, in nested sections.
        section: the dotted key of the section that `tree` is; "" for a whole recipe."""
    prefix = f"{section}." if section else ""
    return {
        key: drop_removed_keys(value, f"{prefix}{key}") if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if not _is_void(f"{prefix}{key}", value)
    }


def _is_void(key: str, value: Any) -> bool:
    removed_key = find_removed_key(key)
    return removed_key is not None and value == removed_key.default


def check_removed_keys(keys: Iterable[str], setting: str) -> None:
    """Refuse removed keys in a setting whose values name keys.

    Args:
        keys: the dotted keys.
        setting: the key of the setting, for the message.

    Raises:
        UserError: naming the first removed key and its remedy."""
    for key in keys:
        if removed_key := find_removed_key(key):
            message = f"{setting}: {key} was removed: {removed_key.remedy}"
            raise UserError(message, key=setting, cause=Cause.UNKNOWN)
