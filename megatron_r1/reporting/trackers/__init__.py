"""Trackers of a run's figures: sends these to the trackers that a recipe names in `run.trackers`,
which are in `services`.

Each tracker has a thread of its own: a server's failures and delays never reach the run. Its
library is imported when a recipe names it."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from r1_grading.base.errors import shorten

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.reporting.formatting import finite_metric
from megatron_r1.reporting.trackers.services import (
    EVALUATION,
    MLFLOW,
    STEP,
    WANDB,
    MlflowTracker,
    TrackedRun,
    Tracker,
    WandbTracker,
    check_wandb,
)

OPENERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    WANDB: WandbTracker,
    MLFLOW: MlflowTracker,
}
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
CLOSE_SECONDS = 60.0
MAX_REASON_CHARS = 200


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError for a tracker whose library is not installed, or that has no key."""
    for name in names:
        if name in OPENERS and find_spec(name) is None:
            raise UserError(
                f"run.trackers: {name} needs a package that is not installed: pip install "
                f"{PACKAGES[name]}, or leave {name} out",
                key="run.trackers",
                cause=Cause.NOT_INSTALLED,
            )
    if WANDB in names:
        check_wandb()


class TrackerSet:
    """Sends the lines of metrics.jsonl and evaluations.jsonl to every tracker.

    The files are the truth: each start sends the lines that a tracked run lacks, so that a crash of
    the run, of the tracker or of the network loses none.

    Args:
        names: the values of `run.trackers`.
        run: what is tracked, with the ids that trackers gave it.
        notify: shows a message.
    """

    def __init__(
        self, names: Sequence[str], run: TrackedRun, notify: Callable[[str], None]
    ) -> None:
        self._notify = notify
        known = [name for name in names if name in OPENERS]
        self._trackers = [BackgroundTracker(name, partial(OPENERS[name], run)) for name in known]

    def send_history(
        self, steps: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
    ) -> None:
        """Send the lines that earlier starts of the run have written and that are not tracked
        yet."""
        for line in steps:
            self._add(STEP, line)
        for line in evaluations:
            self._add(EVALUATION, line)

    def send_step(self, metrics: Mapping[str, Any]) -> None:
        """Send the line of a step."""
        self._add(STEP, metrics)

    def send_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Send the line of an evaluation."""
        self._add(EVALUATION, metrics)

    def close(self, finished: bool) -> None:
        """Send the rest and end the tracked runs.

        Args:
            finished: whether the run is at its last step."""
        for tracker in self._trackers:
            tracker.close(finished)
        self._show_notes()

    def _add(self, key: str, line: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.add(key, line)
        self._show_notes()

    def _show_notes(self) -> None:
        for tracker in self._trackers:
            for note in tracker.notes():
                self._notify(note)


class BackgroundTracker:
    """Opens a tracker and sends it lines, in order. Lines that it has already, of steps trained
    again after a kill, are left out. What fails is sent again with the next line."""

    def __init__(self, name: str, opener: Callable[[], Tracker]) -> None:
        """Start the thread.

        Args:
            name: the tracker's name in messages.
            opener: opens the tracker in the thread, again after each failure."""
        self._name, self._open = name, opener
        self._tracker: Tracker | None = None
        self._newest: dict[str, float] = {}
        self._lines: queue.SimpleQueue[tuple[str, Mapping[str, Any]] | bool] = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def add(self, key: str, line: Mapping[str, Any]) -> None:
        """Send a line soon.

        Args:
            key: `STEP` or `EVALUATION`.
            line: the figures."""
        self._lines.put((key, line))

    def notes(self) -> list[str]:
        """Return what the user should be shown, each note once."""
        return [self._notes.get() for _ in range(self._notes.qsize())]

    def close(self, finished: bool) -> None:
        """End the tracked run, waiting at most `CLOSE_SECONDS`."""
        self._lines.put(finished)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._notes.put(f"{self._name}: not all lines are sent; the same command sends them")

    def _work(self) -> None:
        pending: deque[tuple[str, Mapping[str, Any]]] = deque()
        while True:
            item = self._lines.get()
            if not isinstance(item, bool):
                pending.append(item)
                if not self._lines.empty():
                    continue
            try:
                self._send(pending)
                if isinstance(item, bool) and self._tracker is not None:
                    self._tracker.finish(item)
            except Exception as error:  # noqa: BLE001 - of any library, about any network
                self._report(error, len(pending), is_last=isinstance(item, bool))
            if isinstance(item, bool):
                return

    def _send(self, pending: deque[tuple[str, Mapping[str, Any]]]) -> None:
        if self._tracker is None:
            self._tracker = self._open()
            self._newest = dict(self._tracker.last_tracked)
            for note in self._tracker.notes:
                self._notes.put(note)
        while pending:
            key, line = pending[0]
            if line[STEP] > self._newest.get(key, -1):
                self._tracker.send(line[STEP], _numbers(key, line))
                self._newest[key] = line[STEP]
            pending.popleft()
        self._failed = False

    def _report(self, error: Exception, num_pending: int, *, is_last: bool) -> None:
        """Add a note on the first failure in a row, and on one at the end."""
        reason = shorten((str(error).strip() or "no message").splitlines()[0], MAX_REASON_CHARS)
        failure = f"{self._name}: {type(error).__name__}: {reason}"
        if is_last:
            self._notes.put(f"{failure}; {num_pending} lines are sent by the next start")
        elif not self._failed:
            self._notes.put(f"{failure}; the run goes on, and they are sent with a later step")
        self._failed = True


def _numbers(key: str, line: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line of metrics or of an evaluation, its step as `key`."""
    values = {name: float(line[name]) for name in line if finite_metric(line, name) is not None}
    return {name: value for name, value in values.items() if name != "step"} | {
        key: float(line["step"])
    }
