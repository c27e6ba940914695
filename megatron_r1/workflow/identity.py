"""What decides a stage's result: its settings and inputs, in a form that can be compared."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.config import RESUMABLE, Config
from megatron_r1.reporting.run_folder import flatten
from megatron_r1.user_code import syntax_of
from megatron_r1.workflow import digests
from megatron_r1.workflow.plan import Plan, Stage
from megatron_r1.workflow.references import REFERENCE, references, substitute, texts

DECIDES = ("run.steps", "eval")
"""May change while a run is unfinished, yet decide what a finished one has come to."""


FILE = re.compile(r"\$\{([^{}\n.]+)\}/([^$\n]+)")
"""`${stage}/file`: that file alone is read."""
FILES = ("path", "data", "checkpoint")
"""Last parts of settings that name a file or folder."""
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OWN = {
    "sft": ("sft",),
    "rl": ("rl", "push", "critic", "teacher"),
    "reward-model": ("reward_model",),
    "sample": ("sample",),
}
"""Sections that one verb alone reads."""


def settings(plan: Plan, stage: Stage, finished: bool) -> dict[str, Any]:
    """Dotted key → value of what matters. References stay as written: what they mean is an input,
    so that a pipeline's folder can be moved.

    finished: whether it is to be compared with a stage that is done; one that is not may continue
    with another number of steps.
    """
    if stage.is_function:
        told = substitute(stage.told, lambda name: _kept(plan, name))
        found = flatten({"function": stage.config.function, "arguments": told})
    else:
        flat = flatten(typed(plan, stage).model_dump())
        found = {
            key: value
            for key, value in flat.items()
            if _matters(key, finished) and not _is_of_another(key, stage.config.verb)
        }
    for name, server in stage.config.serve.items():
        served = {key: getattr(server, key) for key in ("model", "task", "arguments", "command")}
        found |= flatten({f"serve.{name}": served})
    return json.loads(json.dumps(found, default=str))


def defaults() -> dict[str, Any]:
    """Those of settings that did not exist yet when a stage was run."""
    return json.loads(json.dumps(flatten(Config().model_dump()), default=str))


def typed(plan: Plan, stage: Stage, required: tuple[str, ...] = ()) -> Config:
    """A stage's settings as its verb will read them, but for references. Raises ValueError."""
    tree = substitute(stage.told, lambda name: _kept(plan, name))
    tree = {section: keys for section, keys in tree.items() if keys is not None}
    return configuration.from_tree(tree, f"{plan.path}, stage {stage.name}", required)


def inputs(plan: Plan, stage: Stage, upstream: tuple[str, ...]) -> dict[str, str]:
    """What it reads → digest: what references mean, files named in its settings, its function."""
    found: dict[str, str] = {}
    for _, text in texts(stage.everything):
        if (file := FILE.fullmatch(text)) and file[1] in upstream:
            found[text] = digests.digest(plan.folder_of(file[1]) / file[2])
            continue
        for _, reference in references(text):
            head = reference.partition(".")[0]
            if head in upstream:
                found[f"${{{reference}}}"] = _of_stage(plan, head, reference)
    for name in stage.config.after:
        found[f"after {name}"] = digests.of_outputs(digests.outputs(plan.folder_of(name)))
    for place, path in named_files(stage):
        found[f"{place} {path}"] = digests.digest(Path(path))
    for function, syntax in _functions(stage).items():
        found[f"function {function}"] = digests.of_value(syntax)
    return found


def _functions(stage: Stage) -> dict[str, str]:
    """Users' own, which it calls - what makes it, rewrites, judges, filters or rewards - and what
    their modules say."""
    if stage.is_function:
        return {stage.config.function: syntax_of(stage.config.function)}
    found = {}
    for text in filter(FUNCTION.fullmatch, _texts_and_keys(stage.told)):
        with contextlib.suppress(ValueError):  # it only looks like one
            found[text] = syntax_of(text)
    return found


def _texts_and_keys(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts_and_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_and_keys(item)


def named_files(stage: Stage) -> list[tuple[str, str]]:
    """(place, path) of every text without references that is the name of a file or folder."""
    served = {f"serve.{name}.model": server.model for name, server in stage.config.serve.items()}
    named = []
    for place, text in texts({**stage.told, **served}):
        looks_like_one = "/" in text or Path(text).suffix or names_a_file(place)
        if (
            place != "run.folder"
            and looks_like_one
            and not REFERENCE.search(text)
            and _is_there(text)
        ):
            named.append((place, text))
    return named


def names_a_file(place: str) -> bool:
    """Whether a setting such as model.path or data.heldout_path does."""
    section, _, key = place.partition(".")
    # A benchmark's path may be its name on the hub.
    return key.rpartition("_")[2] in FILES and "." not in key and section != "eval"


def changes(
    before: dict[str, Any], after: dict[str, Any], known: dict[str, Any] | None = None
) -> list[str]:
    """`rl.group_size: 16 then, 8 now` for each difference. known: values of keys that `before`,
    written by an earlier version, may not have."""
    before = {key: value for key, value in (known or {}).items() if key in after} | before
    keys = [*after, *(key for key in before if key not in after)]
    return [
        f"{key}: {_worded(before, key)} then, {_worded(after, key)} now"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()


def _worded(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not there"


def _matters(key: str, finished: bool) -> bool:
    free = [name for name in RESUMABLE if not (finished and name in DECIDES)]
    return not any(key == name or key.startswith(f"{name}.") for name in free)


def _is_of_another(key: str, verb: str) -> bool:
    section = key.partition(".")[0]
    return any(section in sections for owner, sections in OWN.items() if owner != verb)


def _kept(plan: Plan, reference: str) -> Any:
    if reference == "pipeline.seed":
        return plan.seed
    if reference.startswith("serve."):
        return f"http://{reference.removeprefix('serve.').removesuffix('.url')}.served"
    return f"${{{reference}}}"


def _of_stage(plan: Plan, stage: str, reference: str) -> str:
    if reference == stage:
        return digests.of_outputs(digests.outputs(plan.folder_of(stage)))
    return digests.digest(Path(str(plan.meaning(reference, {}))))


def _is_there(text: str) -> bool:
    try:
        return "\n" not in text and Path(text).exists()
    except OSError:  # too long for a name
        return False
