"""The state of each stage: its manifest compared with what it would be made from now."""

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.pipeline import digests, fingerprint, manifest
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.results import read_results, result_headline
from megatron_r1.pipeline.stages import PipelinePlan, PipelineStage
from megatron_r1.reporting.formatting import format_duration, make_printable


class StageState(enum.StrEnum):
    """The state of a stage, as `pipeline` prints it."""

    DONE = enum.auto()
    STALE = enum.auto()
    """Its settings, inputs or outputs have changed."""
    RUNNING = enum.auto()
    UNFINISHED = enum.auto()
    """Killed or stopped; it can continue."""
    FAILED = enum.auto()
    """Unfinished, and its last attempt failed."""
    PENDING = enum.auto()


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage, with the reasons for it.

    Attributes:
        state: what is left to do.
        reasons: why the stage is stale, or how it failed.
        manifest: the stage's stage.json or begun.json."""

    state: StageState
    reasons: list[str] = field(default_factory=list)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Time of all attempts; None if the stage has not begun, or no attempt was measured."""
        attempts = self.manifest.get("attempts", [])
        durations = [a["seconds"] for a in attempts if a["seconds"] is not None]
        if self.state is StageState.RUNNING:
            durations.append(time.time() - attempts[-1]["began"])
        return sum(durations) if durations else None

    @property
    def reason_lines(self) -> list[str]:
        """Why the stage is stale or has failed, line by line."""
        if self.state not in (StageState.STALE, StageState.FAILED):
            return []
        return [make_printable(line) for reason in self.reasons for line in reason.splitlines()]


def all_statuses(
    plan: PipelinePlan, graph: StageGraph, is_running: bool = False
) -> dict[str, StageStatus]:
    """Return the status of every stage.

    Args:
        plan: the plan of the pipeline.
        graph: the stages and their order.
        is_running: whether another process works on the pipeline.

    Raises:
        UserError: for a folder that is not of this pipeline."""
    statuses: dict[str, StageStatus] = {}
    for name in graph.order:
        upstream = {upper: statuses[upper] for upper in graph.upstream[name]}
        statuses[name] = stage_status(plan, plan.stages[name], upstream, is_running)
    return statuses


def stage_status(
    plan: PipelinePlan,
    stage: PipelineStage,
    upstream: Mapping[str, StageStatus],
    is_running: bool = False,
) -> StageStatus:
    """Return the status of one stage.

    Args:
        plan: the plan of the pipeline.
        stage: the pipeline stage.
        upstream: the statuses of the stages that it needs directly.
        is_running: whether another process works on the pipeline.

    Raises:
        UserError: the stage's folder has files of something else.
    """
    folder = plan.folder_of(stage.name)
    finished_record = manifest.read_record(folder, manifest.STAGE_FILE)
    begun_record = None if finished_record else manifest.read_record(folder, manifest.BEGUN_FILE)
    record = finished_record or begun_record
    if record is None:
        if manifest.has_outputs(folder):
            raise UserError(
                f"{folder} is not empty, and was not made by this pipeline (no "
                f"{manifest.STAGE_FILE}): "
                "move it away, or choose another pipeline.folder",
                key="pipeline.folder",
                cause=Cause.EXISTS,
            )
        return StageStatus(StageState.PENDING)
    if begun_record and (stage.is_function or not manifest.has_outputs(folder)):
        return _unfinished_status(begun_record, is_running)  # nothing is lost by beginning again
    reasons = [
        f"{name} is {status.state}"
        for name, status in upstream.items()
        if status.state is not StageState.DONE
    ]
    reasons += fingerprint.describe_setting_changes(
        record["settings"],
        fingerprint.deciding_settings(plan, stage, bool(finished_record)),
        fingerprint.default_settings(),
    )
    if not reasons:  # else inputs may be missing
        inputs = fingerprint.input_digests(plan, stage, tuple(upstream))
        reasons = _changed_inputs(record["inputs"], inputs)
    if finished_record:
        reasons += _changed_outputs(finished_record["outputs"], fingerprint.output_digests(folder))
    if reasons:
        return StageStatus(StageState.STALE, reasons, record)
    return (
        StageStatus(StageState.DONE, [], record)
        if finished_record
        else _unfinished_status(record, is_running)
    )


def status_lines(
    plan: PipelinePlan, stage_names: Sequence[str], statuses: Mapping[str, StageStatus]
) -> list[str]:
    """Return a line per chosen stage (state, name, verb, time, first result), each followed by the
    reasons why it is stale or has failed.

    Args:
        plan: the stages of one seed.
        stage_names: the names of the stages, in the order of the lines.
        statuses: the status of each stage, by name."""
    rows = []
    for name in stage_names:
        stage, status = plan.stages[name], statuses[name]
        seconds = format_duration(status.seconds) if status.seconds is not None else ""
        has_failed = status.state is StageState.FAILED
        result = "" if has_failed else result_headline(read_results(plan.folder_of(name)))
        rows.append([str(status.state), name, stage.config.verb, seconds, result])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
        lines += [f"  {reason}" for reason in statuses[row[1]].reason_lines]
    if num_others := len(plan.stages) - len(stage_names):
        lines.append(f"not asked for: {num_others} more")
    return lines


def stale_text(plan: PipelinePlan, stale: Mapping[str, StageStatus]) -> str:
    """Return which stages are stale, why, and the remedies."""
    lines = [f"{plan.folder}: made of something else than they would be now:"]
    for name, status in stale.items():
        lines += [f"  {name}: {reason}" for reason in status.reason_lines]
    lines.append(
        "--pipeline.rerun true moves them aside, to STAGE.old-N, and does them again; or put back "
        "what they were made of: settings from the command line are to be given every time."
    )
    return "\n".join(lines)


def _unfinished_status(begun_record: Mapping[str, Any], is_running: bool) -> StageStatus:
    if begun_record["failed"]:
        return StageStatus(StageState.FAILED, [begun_record["failed"]], begun_record)
    is_over = begun_record["attempts"][-1]["seconds"] is not None
    is_active = is_running and not is_over
    return StageStatus(StageState.RUNNING if is_active else StageState.UNFINISHED, [], begun_record)


def _changed_inputs(before: dict[str, str], after: dict[str, str]) -> list[str]:
    reasons = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            reasons.append(f"{name} was an input then, and is not one now")
        elif name not in before:
            reasons.append(f"{name} is an input now, and was not one then")
        elif before[name] != after[name]:
            is_missing = after[name] == digests.MISSING
            reasons.append(f"{name} is gone" if is_missing else f"{name} has changed")
    return reasons


def _changed_outputs(before: dict[str, str], after: dict[str, str]) -> list[str]:
    reasons = [f"its {name} is gone" for name in before if name not in after]
    return reasons + [
        f"its {name} is not what it wrote"
        for name, digest in after.items()
        if before.get(name, digests.MISSING) != digest
    ]
