"""Notices that nothing moves, says once what everything waits for, and acts by `run.on_hang`."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import time
from pathlib import Path

from megatron_r1.files import atomic_write
from megatron_r1.supervision.diagnosis import diagnose, report
from megatron_r1.supervision.findings import Finding, seconds
from megatron_r1.supervision.inspect_engines import count_tokens
from megatron_r1.supervision.run_handles import RunHandles

MAX_TICK_SECONDS = 5.0
# A controller whose event loop is blocked cannot report: after so long at least, a thread of C
# writes its stacks.
MIN_BLOCKED_SECONDS = 60.0


class HangError(RuntimeError):
    """Nothing moved for too long; the message says what everything waits for."""


class Watchdog:
    """num_reports: hangs so far."""

    def __init__(self, run: RunHandles) -> None:
        self.watched = run
        self.hang_seconds = run.config.run.hang_seconds
        self.num_reports = 0
        self._pulse = run.pulse()
        self._quiet = 0.0

    @property
    def quiet_seconds(self) -> float:
        """For how long nothing has moved, by the last tick."""
        return self._quiet if self.watched.pulse() == self._pulse else 0.0

    @property
    def is_stalled(self) -> bool:
        if not self.hang_seconds:
            return False
        limit = self.hang_seconds
        if self.watched.is_starting:  # as long as engines may take, who say nothing meanwhile
            limit = max(limit, self.watched.config.rollout.start_timeout_seconds)
        return self.quiet_seconds >= limit

    async def watch(self) -> None:
        """Watch until cancelled. Raises HangError where the run is to stop."""
        tick = min(MAX_TICK_SECONDS, self.hang_seconds / 5) if self.hang_seconds else 1.0
        is_reported = False
        with self._blocked_loop_writes_stacks() as alive, contextlib.ExitStack() as stack:
            counting = asyncio.create_task(self._count_tokens(tick))
            stack.callback(counting.cancel)
            ticked = time.monotonic()
            while True:
                await asyncio.sleep(tick)
                alive()
                pulse, now = self.watched.pulse(), time.monotonic()
                if pulse == self._pulse:
                    # No more than a tick's worth: this process itself may have been suspended.
                    self._quiet += min(now - ticked, 2 * tick)
                else:
                    if is_reported:
                        self.watched.recorder.view.message("the run moves again")
                    self._pulse, self._quiet, is_reported = pulse, 0.0, False
                ticked = now
                if self.is_stalled and not is_reported:
                    is_reported = await self._act()
                    ticked = time.monotonic()

    async def _count_tokens(self, every_seconds: float) -> None:
        """Beside the ticks: an engine that does not answer must not slow them down."""
        while True:
            await asyncio.sleep(every_seconds)
            if self.watched.rollouts is not None:
                self.watched.num_engine_tokens = await count_tokens(self.watched.rollouts)

    async def _act(self) -> bool:
        """Report and do what `run.on_hang` says; whether to say nothing more about this hang."""
        self.num_reports += 1
        findings = await diagnose(self.watched)
        path = self._path()
        content = report(self.watched, findings, self.quiet_seconds)
        await asyncio.to_thread(atomic_write, path, content)
        headline = findings[0].headline
        told = (
            f"nothing has moved for {seconds(self.quiet_seconds)}. Everything waits for {headline}"
        )
        told += f"\nall roles and stacks: {path}"
        policy = self.watched.config.run.on_hang
        if policy == "report":
            self.watched.recorder.view.message(told)
            return True
        if policy == "stop":
            raise HangError(f"{told}\nthe same command continues from the newest checkpoint")
        await self._mend(findings[0], told)
        return False

    async def _mend(self, finding: Finding, told: str) -> None:
        """Kill what hangs; what is there for its death starts it again, as often as it may."""
        if finding.mend is None:
            raise HangError(
                f"{told}\nthis cannot be restarted by itself; the same command continues"
            )
        self.watched.recorder.view.message(f"{told}\nkilled, to be started again")
        self._quiet = 0.0
        await finding.mend()

    def _path(self) -> Path:
        name = f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        return self.watched.folder / "logs" / name

    @contextlib.contextmanager
    def _blocked_loop_writes_stacks(self):
        if not self.hang_seconds:
            yield lambda: None
            return
        path = self.watched.folder / "logs" / "controller-blocked.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        limit = max(self.hang_seconds, MIN_BLOCKED_SECONDS)
        with open(path, "a", encoding="utf-8") as file:

            def alive() -> None:
                faulthandler.dump_traceback_later(limit, file=file)

            alive()
            try:
                yield alive
            finally:
                faulthandler.cancel_dump_traceback_later()
                if not path.stat().st_size:
                    path.unlink()
