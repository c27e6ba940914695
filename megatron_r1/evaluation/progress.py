"""The progress of sampling: one line that changes on a terminal, about twenty lines in a log."""

import sys
import time

from megatron_r1.reporting.wording import duration

NUM_LOG_LINES = 20
REFRESH_SECONDS = 0.2


class Progress:
    """Called with (finished, wanted) after each sample; prints only what changes visibly."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._began: float | None = None
        self._first = 0
        self._shown_at = -1.0
        self._shown_share = -1

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, done
        share = NUM_LOG_LINES * done // total if total else NUM_LOG_LINES
        if self._is_terminal:
            if now - self._shown_at < REFRESH_SECONDS and done < total:
                return
        elif share == self._shown_share and done < total:
            return
        self._shown_at, self._shown_share = now, share
        line = f"{done:,} of {total:,} samples graded{self._rest(now, done, total)}"
        if self._is_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if done == total else "", flush=True)
        else:
            print(line, flush=True)

    def _rest(self, now: float, done: int, total: int) -> str:
        new = done - self._first
        if not new or done == total:
            return ""
        assert self._began is not None
        return f", about {duration((now - self._began) / new * (total - done))} to go"
