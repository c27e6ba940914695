"""Sends lines to one tracker from a thread of its own: a server's failures and delays never reach
the run."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from r1_grading.base.errors import shorten

from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.reporting.trackers.tracker import STEP_METRIC, Tracker

CLOSE_SECONDS = 60.0
MAX_REASON_CHARS = 200


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
        self._last_steps: dict[str, float] = {}
        self._lines: queue.SimpleQueue[tuple[str, Mapping[str, Any]] | bool] = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._send_loop, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def add(self, key: str, line: Mapping[str, Any]) -> None:
        """Send a line soon.

        Args:
            key: `STEP_METRIC` or `EVALUATION`.
            line: the metrics."""
        self._lines.put((key, line))

    def notes(self) -> list[str]:
        """Return what the user should be shown, each note once."""
        return [self._notes.get() for _ in range(self._notes.qsize())]

    def close(self, is_finished: bool) -> None:
        """End the tracked run, waiting at most `CLOSE_SECONDS`."""
        self._lines.put(is_finished)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._notes.put(f"{self._name}: not all lines are sent; the same command sends them")

    def _send_loop(self) -> None:
        pending_lines: deque[tuple[str, Mapping[str, Any]]] = deque()
        while True:
            item = self._lines.get()
            if not isinstance(item, bool):
                pending_lines.append(item)
                if not self._lines.empty():
                    continue
            try:
                self._send_lines(pending_lines)
                if isinstance(item, bool) and self._tracker is not None:
                    self._tracker.finish(item)
            except Exception as error:  # noqa: BLE001 - of any library, about any network
                self._note_failure(error, len(pending_lines), is_last=isinstance(item, bool))
            if isinstance(item, bool):
                return

    def _send_lines(self, pending_lines: deque[tuple[str, Mapping[str, Any]]]) -> None:
        if self._tracker is None:
            self._tracker = self._open()
            self._last_steps = dict(self._tracker.tracked_steps)
            for note in self._tracker.notes:
                self._notes.put(note)
        while pending_lines:
            key, line = pending_lines[0]
            if line[STEP_METRIC] > self._last_steps.get(key, -1):
                self._tracker.send(line[STEP_METRIC], _finite_numbers(key, line))
                self._last_steps[key] = line[STEP_METRIC]
            pending_lines.popleft()
        self._has_failed = False

    def _note_failure(self, error: Exception, num_pending: int, *, is_last: bool) -> None:
        """Add a note on the first failure in a row, and on one at the end."""
        reason = shorten((str(error).strip() or "no message").splitlines()[0], MAX_REASON_CHARS)
        failure = f"{self._name}: {type(error).__name__}: {reason}"
        if is_last:
            self._notes.put(f"{failure}; {num_pending} lines are sent by the next start")
        elif not self._has_failed:
            self._notes.put(f"{failure}; the run goes on, and they are sent with a later step")
        self._has_failed = True


def _finite_numbers(key: str, line: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line of metrics or of an evaluation, its step as `key`."""
    values = {name: float(line[name]) for name in line if finite_metric(line, name) is not None}
    return {name: value for name, value in values.items() if name != "step"} | {
        key: float(line["step"])
    }
