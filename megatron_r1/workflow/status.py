"""Where a pipeline stands, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_r1.reporting.wording import duration, printable
from megatron_r1.workflow.figures import figures_of, headline
from megatron_r1.workflow.plan import Plan
from megatron_r1.workflow.state import State, Status


def status_lines(plan: Plan, chosen: Sequence[str], statuses: Mapping[str, Status]) -> list[str]:
    """A line per chosen stage: state, name, verb, time, its first number; below it why it is
    stale."""
    rows = []
    for name in chosen:
        stage, status = plan.stages[name], statuses[name]
        took = duration(status.seconds) if status.seconds is not None else ""
        told = "" if status.state is State.FAILED else headline(figures_of(plan.folder_of(name)))
        rows.append([str(status.state), name, stage.config.verb, took, told])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
        lines += [f"  {reason}" for reason in reasons(statuses[row[1]])]
    if others := len(plan.stages) - len(chosen):
        lines.append(f"not asked for: {others} more")
    return lines


def reasons(status: Status) -> list[str]:
    """Why a stage is stale or has failed, line by line."""
    if status.state not in (State.STALE, State.FAILED):
        return []
    return [printable(line) for reason in status.reasons for line in reason.splitlines()]


def stale_text(plan: Plan, stale: Mapping[str, Status]) -> str:
    """Which stages are stale and why, and what is to be done about it."""
    lines = [f"{plan.folder}: made of something else than they would be now:"]
    for name, status in stale.items():
        lines += [f"  {name}: {reason}" for reason in reasons(status)]
    lines.append(
        "--pipeline.rerun true moves them aside, to STAGE.old-N, and does them again; or put back "
        "what they were made of: settings from the command line are to be given every time."
    )
    return "\n".join(lines)
