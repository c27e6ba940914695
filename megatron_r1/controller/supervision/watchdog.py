"""Detects a run without progress, reports what it waits for, and acts by `run.on_hang`."""

import asyncio
import contextlib
import faulthandler
import time
from collections.abc import Callable, Iterator

from megatron_r1.base.errors import RunError
from megatron_r1.base.files import atomic_write
from megatron_r1.controller.supervision.hang_diagnosis import (
    count_tokens,
    diagnose_hang,
    hang_report,
)
from megatron_r1.controller.supervision.watched_run import WatchedRun
from megatron_r1.reporting.formatting import format_seconds
from megatron_r1.trainer.operations import CheckpointOperations, operation_names

MAX_TICK_SECONDS = 5.0
MIN_BLOCKED_SECONDS = 60.0
"""The least time after which a controller whose event loop is blocked has its stacks dumped. It
cannot report anything itself, so a thread of `faulthandler`, written in C, does."""


class HangError(RunError):
    """The run has made no progress for too long; the message is the diagnosis."""


class Watchdog:
    """Compares the progress of a run from tick to tick.

    Attributes:
        run: the roles of the run.
        hang_seconds: `run.hang_seconds`; 0: no hang is detected.
        num_reports: hangs so far.
    """

    def __init__(self, run: WatchedRun) -> None:
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
        """Whether there was no progress for longer than the present work may take."""
        if not self.hang_seconds:
            return False
        limit = self.hang_seconds
        if self.run.is_starting:  # starting engines show no progress
            limit = max(limit, self.run.config.rollout.start_timeout_seconds)
        pending_call = self.run.trainer.pending_call
        if pending_call is not None and pending_call.operation in operation_names(
            CheckpointOperations
        ):
            # Writing a model of a terabyte shows no progress before it is done.
            limit = max(limit, self.run.config.parallel.timeout_seconds)
        return self.quiet_seconds >= limit

    async def watch(self) -> None:
        """Watch until cancelled.

        Raises:
            HangError: the run must stop.
        """
        tick = min(MAX_TICK_SECONDS, self.hang_seconds / 5) if self.hang_seconds else 1.0
        is_reported = False
        with self._stacks_of_a_blocked_loop() as postpone, contextlib.ExitStack() as stack:
            count_task = asyncio.create_task(self._count_tokens(tick))
            stack.callback(count_task.cancel)
            last_tick = time.monotonic()
            while True:
                await asyncio.sleep(tick)
                postpone()
                progress, this_tick = self.run.progress(), time.monotonic()
                if progress == self._progress:
                    # At most the time of two ticks: this process may have been suspended itself.
                    self._quiet += min(this_tick - last_tick, 2 * tick)
                else:
                    if is_reported:
                        self.run.recorder.view.show_message("the run moves again")
                    self._progress, self._quiet, is_reported = progress, 0.0, False
                last_tick = this_tick
                if self.is_stalled and not is_reported:
                    is_reported = await self._handle_hang()
                    last_tick = time.monotonic()

    async def _count_tokens(self, every_seconds: float) -> None:
        # In a task of its own: when a tick scraped an engine that was stopped, a 6 s hang was
        # noticed after 34 s.
        while True:
            await asyncio.sleep(every_seconds)
            if self.run.collector is not None:
                self.run.num_engine_tokens = await count_tokens(self.run.collector)

    async def _handle_hang(self) -> bool:
        """Write a report and act by `run.on_hang`. Return whether to stay silent until there is
        progress."""
        self.num_reports += 1
        diagnoses = await diagnose_hang(self.run)
        path = self.run.folder / "logs" / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        content = hang_report(self.run, diagnoses, self.quiet_seconds)
        await asyncio.to_thread(atomic_write, path, content)
        message = (
            f"nothing has moved for {format_seconds(self.quiet_seconds)}. Everything waits for "
            f"{diagnoses[0].headline}\nall roles and stacks: {path}"
        )
        policy = self.run.config.run.on_hang
        if policy == "report":
            self.run.recorder.view.show_message(message)
            return True
        if policy == "stop":
            raise HangError(f"{message}\nthe same command continues from the newest checkpoint")
        if diagnoses[0].recover is None:
            raise HangError(
                f"{message}\nthis cannot be restarted by itself; the same command continues"
            )
        self.run.recorder.view.show_message(f"{message}\nkilled, to be started again")
        self._quiet = 0.0
        await diagnoses[0].recover()  # its supervisor restarts it up to its limit of restarts
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
                with contextlib.suppress(OSError):
                    if not path.stat().st_size:
                        path.unlink()
