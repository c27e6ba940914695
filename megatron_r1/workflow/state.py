"""Where each stage stands: compared with what its folder says it was made of."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.workflow import digests, identity, record
from megatron_r1.workflow.graph import Graph
from megatron_r1.workflow.plan import Plan, Stage


class State(enum.StrEnum):
    DONE = enum.auto()
    STALE = enum.auto()
    """Made of something else than it would be now."""
    RUNNING = enum.auto()
    UNFINISHED = enum.auto()
    """Killed or stopped; goes on where it was."""
    FAILED = enum.auto()
    """As unfinished; its last attempt ended by itself."""
    PENDING = enum.auto()


@dataclass(frozen=True)
class Status:
    """reasons: why it is stale, or how it failed. made: its stage.json or begun.json."""

    state: State
    reasons: list[str] = field(default_factory=list)
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Of work so far; None for a stage that has not begun, and where nobody measured."""
        attempts = self.made.get("attempts", [])
        measured = [a["seconds"] for a in attempts if a["seconds"] is not None]
        if self.state is State.RUNNING:
            measured.append(time.time() - attempts[-1]["began"])
        return sum(measured) if measured else None


def examine_all(plan: Plan, graph: Graph, is_running: bool = False) -> dict[str, Status]:
    """The status of every stage. is_running: whether another process works on the pipeline. Raises
    ValueError for a folder that is not of this pipeline.
    """
    found: dict[str, Status] = {}
    for name in graph.order:
        above = {upper: found[upper] for upper in graph.upstream[name]}
        found[name] = examine(plan, plan.stages[name], above, is_running)
    return found


def examine(
    plan: Plan, stage: Stage, upstream: Mapping[str, Status], is_running: bool = False
) -> Status:
    """The status of one stage, given those that it needs directly."""
    folder = plan.folder_of(stage.name)
    done = record.read(folder, record.DONE)
    begun = None if done else record.read(folder, record.BEGUN)
    made = done or begun
    if made is None:
        _refuse_strangers(folder)
        return Status(State.PENDING)
    if begun and (stage.is_function or not record.has_made_something(folder)):
        return _of_unfinished(begun, is_running)  # nothing is lost by beginning again
    reasons = [
        f"{name} is {status.state}" for name, status in upstream.items() if _is_not_done(status)
    ]
    reasons += identity.changes(
        made["settings"], identity.settings(plan, stage, bool(done)), identity.defaults()
    )
    if not reasons:  # else inputs may not be there
        reasons = _worded_inputs(made["inputs"], identity.inputs(plan, stage, tuple(upstream)))
    if done:
        reasons += _damage(folder, done["outputs"])
    if reasons:
        return Status(State.STALE, reasons, made)
    return Status(State.DONE, [], made) if done else _of_unfinished(made, is_running)


def _of_unfinished(begun: Mapping[str, Any], is_running: bool) -> Status:
    if begun["failed"]:
        return Status(State.FAILED, [begun["failed"]], begun)
    is_over = begun["attempts"][-1]["seconds"] is not None
    running = is_running and not is_over
    return Status(State.RUNNING if running else State.UNFINISHED, [], begun)


def _is_not_done(status: Status) -> bool:
    return status.state is not State.DONE


def _worded_inputs(before: dict[str, str], after: dict[str, str]) -> list[str]:
    reasons = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            reasons.append(f"{name} was an input then, and is none now")
        elif name not in before:
            reasons.append(f"{name} is an input now, and was none then")
        elif before[name] != after[name]:
            gone = after[name] == digests.MISSING
            reasons.append(f"{name} is gone" if gone else f"{name} has changed")
    return reasons


def _damage(folder: Path, before: dict[str, str]) -> list[str]:
    after = digests.outputs(folder)
    gone = [f"its {name} is gone" for name in before if name not in after]
    return gone + [
        f"its {name} is not what it wrote"
        for name, found in after.items()
        if before.get(name, digests.MISSING) != found
    ]


def _refuse_strangers(folder: Path) -> None:
    if record.has_made_something(folder):
        raise ValueError(
            f"{folder} is not empty, and was not made by this pipeline (no {record.DONE}): move it "
            "away, or choose another pipeline.folder"
        )
