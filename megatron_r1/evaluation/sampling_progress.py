"""The progress of sampling, in a terminal or a log: samples graded, and the time that is left."""

import sys
import time

from megatron_r1.reporting.formatting import format_duration

NUM_PROGRESS_LINES = 4
REFRESH_SECONDS = 0.2


class SamplingProgress:
    """Shows progress, as one line that changes on a terminal or a few lines in a log. Called
    with (finished, wanted) after each sample."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._began: tuple[float, int] | None = None  # time, and samples finished before
        self._next_line_at = 0.0  # on a terminal
        self._num_parts_shown = -1  # in a log, of `NUM_PROGRESS_LINES`

    def __call__(self, num_done: int, total: int) -> None:
        """Print a line if it is time for one: samples done, and the time that is left."""
        now = time.monotonic()
        began, first = self._began = self._began or (now, num_done)
        num_parts = NUM_PROGRESS_LINES * num_done // max(1, total)
        is_new_part = num_parts > self._num_parts_shown
        is_due = now >= self._next_line_at if self._is_terminal else is_new_part
        if not is_due and num_done < total:
            return
        self._next_line_at, self._num_parts_shown = now + REFRESH_SECONDS, num_parts
        line = f"{num_done:,} of {total:,} samples graded"
        if first < num_done < total:
            seconds_left = (now - began) / (num_done - first) * (total - num_done)
            line += f", about {format_duration(seconds_left)} to go"
        if self._is_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if num_done == total else "", flush=True)
        else:
            print(line, flush=True)
