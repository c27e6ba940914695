"""Finds the cause of a hang: inspects every role, ranks them, and writes a report."""

import asyncio
import socket
import time
import traceback
from collections.abc import Coroutine
from typing import Any, cast

from megatron_r1.controller.supervision import inspect_roles
from megatron_r1.controller.supervision.inspect_roles import RoleFinding, indented, rounded
from megatron_r1.controller.supervision.run_handles import RunHandles


async def diagnose(run: RunHandles) -> list[RoleFinding]:
    """Return a finding per role; the first is what everything waits for."""
    rollouts = run.rollouts
    inspections = [inspect_roles.inspect_trainer(run.trainer)]
    if rollouts is not None:
        inspections.append(inspect_roles.inspect_engines(rollouts, pushing=_is_pushing(run)))
        if rollouts.teacher is not None:
            inspections.append(inspect_roles.inspect_teacher(rollouts))
    findings = {finding.role: finding for finding in await asyncio.gather(*inspections)}
    if rollouts is not None:
        findings["rewards"] = inspect_roles.inspect_rewards(rollouts)
    findings["controller"] = _inspect_controller(run)
    awaited = _awaited_role(run)
    return [findings.pop(awaited), *findings.values()]


def report(run: RunHandles, findings: list[RoleFinding], quiet_seconds: float) -> str:
    """Return the text of a hang's report. quiet_seconds: since the last progress."""
    step = run.recorder.latest.get("step", run.recorder.state.step)
    lines = [
        f"Nothing has moved for {rounded(quiet_seconds)}.",
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, controller on {socket.gethostname()}, "
        f"last finished step {step}",
        "",
        f"Everything waits for: {findings[0].headline}",
    ]
    for finding in findings:
        title = finding.headline
        lines += ["", title, "-" * min(len(title), 100), *indented(finding.details, 0)]
    return "\n".join(lines) + "\n"


def _awaited_role(run: RunHandles) -> str:
    """Return the role that the controller waits for.

    An open call to the trainer comes first, since engines may generate for a later step meanwhile.
    Groups are sampled, then graded, then scored: the earliest of these phases comes next."""
    if run.trainer.waiting is not None:
        return "trainer"
    rollouts = run.rollouts
    if rollouts is None:
        return "controller"
    if rollouts.in_flight.count("sampling") or _is_pushing(run):
        return "engines"
    if rollouts.in_flight.count("grading"):
        return "rewards"
    return "teacher" if rollouts.in_flight.count("scoring") else "controller"


def _is_pushing(run: RunHandles) -> bool:
    return run.recorder.view.doing[0] == "push"


def _inspect_controller(run: RunHandles) -> RoleFinding:
    phase, detail = run.recorder.view.doing
    doing = f"{phase} ({detail})" if detail else phase or "nothing"
    details = []
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            details += [f"task {task.get_name()}", *indented(_suspended_frames(task))]
    return RoleFinding("controller", f"controller: in phase {doing}", details)


def _suspended_frames(task: asyncio.Task[Any]) -> list[str]:
    """Return the frames of a suspended task, coroutine by coroutine: `task.get_stack` has the
    outermost one only."""
    frames = []
    coroutine: Any = cast(Coroutine[Any, Any, Any], task.get_coro())
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = coroutine.cr_await
    summary = traceback.StackSummary.extract(iter(frames))
    return [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in summary]
