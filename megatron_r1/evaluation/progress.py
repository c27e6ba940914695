"""Shows how many samples of `eval` or `sample` are graded."""

import sys
import time

from megatron_r1.reporting.wording import duration

NUM_PROGRESS_LINES = 4
REFRESH_SECONDS = 0.2


class SamplingProgress:
    """Shows progress, as one line that changes on a terminal or a few lines in a log. Called
    with (finished, wanted) after each sample."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._began: tuple[float, int] | None = None  # time, and samples finished before
        self._next = 0.0  # prints from this time on a terminal, from this share in a log

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        began, first = self._began = self._began or (now, done)
        reached = now if self._is_terminal else NUM_PROGRESS_LINES * done // max(1, total)
        if reached < self._next and done < total:
            return
        self._next = reached + (REFRESH_SECONDS if self._is_terminal else 1)
        line = f"{done:,} of {total:,} samples graded"
        if first < done < total:
            line += f", about {duration((now - began) / (done - first) * (total - done))} to go"
        if self._is_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if done == total else "", flush=True)
        else:
            print(line, flush=True)
