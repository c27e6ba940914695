"""Detects a run without progress, reports the cause, and acts by `run.on_hang`."""

import asyncio
import contextlib
import faulthandler
import socket
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

from megatron_r1.errors import RunError
from megatron_r1.files import atomic_write
from megatron_r1.supervision import inspect_roles
from megatron_r1.supervision.inspect_roles import Finding, count_tokens, indented, rounded
from megatron_r1.supervision.run_handles import RunHandles

MAX_TICK_SECONDS = 5.0
# A controller whose event loop is blocked cannot report. After at least this long, a thread of
# `faulthandler`, written in C, dumps its stacks.
MIN_BLOCKED_SECONDS = 60.0


class HangError(RunError):
    """The run has made no progress for too long; the message is the diagnosis."""


class Watchdog:
    """Compares the progress of a run from tick to tick. num_reports: hangs so far."""

    def __init__(self, run: RunHandles) -> None:
        self.run = run
        self.hang_seconds = run.config.run.hang_seconds
        self.num_reports = 0
        self._progress = run.progress()
        self._quiet = 0.0

    @property
    def quiet_seconds(self) -> float:
        """Time without progress, by the last tick."""
        return self._quiet if self.run.progress() == self._progress else 0.0

    @property
    def is_stalled(self) -> bool:
        if not self.hang_seconds:
            return False
        limit = self.hang_seconds
        if self.run.is_starting:  # starting engines show no progress
            limit = max(limit, self.run.config.rollout.start_timeout_seconds)
        return self.quiet_seconds >= limit

    async def watch(self) -> None:
        """Watch until cancelled. Raises HangError where the run must stop."""
        tick = min(MAX_TICK_SECONDS, self.hang_seconds / 5) if self.hang_seconds else 1.0
        is_reported = False
        with self._stacks_of_a_blocked_loop() as postpone, contextlib.ExitStack() as stack:
            counting = asyncio.create_task(self._count_tokens(tick))
            stack.callback(counting.cancel)
            ticked = time.monotonic()
            while True:
                await asyncio.sleep(tick)
                postpone()
                progress, now = self.run.progress(), time.monotonic()
                if progress == self._progress:
                    # At most the time of two ticks: this process may have been suspended itself.
                    self._quiet += min(now - ticked, 2 * tick)
                else:
                    if is_reported:
                        self.run.recorder.view.message("the run moves again")
                    self._progress, self._quiet, is_reported = progress, 0.0, False
                ticked = now
                if self.is_stalled and not is_reported:
                    is_reported = await self._handle_hang()
                    ticked = time.monotonic()

    async def _count_tokens(self, every_seconds: float) -> None:
        # In a task of its own: when a tick scraped an engine that was stopped, a 6 s hang was
        # noticed after 34 s.
        while True:
            await asyncio.sleep(every_seconds)
            if self.run.rollouts is not None:
                self.run.num_engine_tokens = await count_tokens(self.run.rollouts)

    async def _handle_hang(self) -> bool:
        """Write a report and act by `run.on_hang`; return whether to stay silent until progress."""
        self.num_reports += 1
        findings = await diagnose(self.run)
        path = self.run.folder / "logs" / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        content = report(self.run, findings, self.quiet_seconds)
        await asyncio.to_thread(atomic_write, path, content)
        message = (
            f"nothing has moved for {rounded(self.quiet_seconds)}. Everything waits for "
            f"{findings[0].headline}\nall roles and stacks: {path}"
        )
        policy = self.run.config.run.on_hang
        if policy == "report":
            self.run.recorder.view.message(message)
            return True
        if policy == "stop":
            raise HangError(f"{message}\nthe same command continues from the newest checkpoint")
        if findings[0].recover is None:
            raise HangError(
                f"{message}\nthis cannot be restarted by itself; the same command continues"
            )
        self.run.recorder.view.message(f"{message}\nkilled, to be started again")
        self._quiet = 0.0
        await findings[0].recover()  # its supervisor restarts it up to its limit of restarts
        return False

    @contextlib.contextmanager
    def _stacks_of_a_blocked_loop(self) -> Iterator[Callable[[], None]]:
        """Yield a function that postpones the dump of this process's stacks; without calls of it
        they are written to `logs/controller-blocked.txt`."""
        if not self.hang_seconds:
            yield lambda: None
            return
        path = self.run.folder / "logs" / "controller-blocked.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        limit = max(self.hang_seconds, MIN_BLOCKED_SECONDS)
        with open(path, "a", encoding="utf-8") as file:

            def postpone() -> None:
                faulthandler.dump_traceback_later(limit, file=file)

            postpone()
            try:
                yield postpone
            finally:
                faulthandler.cancel_dump_traceback_later()
                if not path.stat().st_size:
                    path.unlink()


async def diagnose(run: RunHandles) -> list[Finding]:
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


def report(run: RunHandles, findings: list[Finding], quiet_seconds: float) -> str:
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


def _inspect_controller(run: RunHandles) -> Finding:
    phase, detail = run.recorder.view.doing
    doing = f"{phase} ({detail})" if detail else phase or "nothing"
    details = []
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            details += [f"task {task.get_name()}", *indented(_suspended_frames(task))]
    return Finding("controller", f"controller: in phase {doing}", details)


def _suspended_frames(task: asyncio.Task[Any]) -> list[str]:
    """Return the frames of a suspended task: `task.get_stack` has the outermost coroutine only."""
    frames = []
    coroutine: Any = cast(Coroutine[Any, Any, Any], task.get_coro())
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = coroutine.cr_await
    summary = traceback.StackSummary.extract(iter(frames))
    return [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in summary]
