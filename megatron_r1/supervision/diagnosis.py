"""What everything waits for: a look at every role, the one to blame first, and the report of it."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback

from megatron_r1.supervision.findings import Finding, indented, seconds
from megatron_r1.supervision.inspect_engines import inspect_engines, inspect_teacher
from megatron_r1.supervision.inspect_rewards import inspect_rewards
from megatron_r1.supervision.inspect_trainer import inspect_trainer
from megatron_r1.supervision.run_handles import RunHandles


async def diagnose(run: RunHandles) -> list[Finding]:
    """The first is what everything waits for."""
    rollouts = run.rollouts
    looks = [inspect_trainer(run.trainer)]
    if rollouts is not None:
        looks.append(inspect_engines(rollouts, pushing=_is_pushing(run)))
        if rollouts.teacher is not None:
            looks.append(inspect_teacher(rollouts))
    findings = {finding.role: finding for finding in await asyncio.gather(*looks)}
    if rollouts is not None:
        findings["rewards"] = inspect_rewards(rollouts)
    findings["controller"] = _look_at_controller(run)
    blamed = _blamed(run)
    return [findings.pop(blamed), *findings.values()]


def _blamed(run: RunHandles) -> str:
    """The role whose answer the controller waits for. Engines may generate for a later step while
    the trainer trains, so an open call to the trainer comes first; a group is graded after it was
    sampled, so what is sampled comes before what is graded, and that before what is scored."""
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


def _look_at_controller(run: RunHandles) -> Finding:
    phase, detail = run.recorder.view.doing
    doing = f"{phase} ({detail})" if detail else phase or "nothing"
    details = []
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            details += [f"task {task.get_name()}", *indented(_awaits(task))]
    return Finding("controller", f"controller: in phase {doing}", details)


def _awaits(task: asyncio.Task) -> list[str]:
    """Where a suspended task is, coroutine by coroutine: its own stack has the outermost only."""
    frames, coroutine = [], task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = coroutine.cr_await
    summary = traceback.StackSummary.extract(iter(frames))
    return [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in summary]


def report(run: RunHandles, findings: list[Finding], quiet_seconds: float) -> str:
    """All of it, for a file."""
    step = run.recorder.latest.get("step", run.recorder.state.step)
    lines = [
        f"Nothing has moved for {seconds(quiet_seconds)}.",
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, controller on {socket.gethostname()}, "
        f"last finished step {step}",
        "",
        f"Everything waits for: {findings[0].headline}",
    ]
    for finding in findings:
        title = finding.headline
        lines += ["", title, "-" * min(len(title), 100), *indented(finding.details, 0)]
    return "\n".join(lines) + "\n"
