"""What `megatron-r1 score` says of its work: now and then on stderr, and once at the end."""

import sys
import time
from collections import defaultdict

from megatron_r1.reporting.wording import duration
from megatron_r1.rewards.base import UNGRADED, Grade
from megatron_r1.rewards.runtime.pool import RewardPool

PROGRESS_SECONDS = 5.0
MAX_KINDS = 20
FAILURES = {
    "timeouts": "timed out",
    "crashes": "crashes of a grader",
    "out_of_memory": "out of memory",
}


class ScoreTally:
    """Counts lines and adds up rewards by kind, of the lines that were graded."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool
        self._started = self._said = time.perf_counter()
        self.num_lines = 0
        self.num_ungraded = 0
        self.first_ungraded = ""
        self.num_service_failures = 0
        self.first_service_failure = ""
        self._rewards: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])

    def add(self, kind: object, grade: Grade) -> None:
        self.num_lines += 1
        if grade.reason.startswith(UNGRADED):
            self.num_ungraded += 1
            self.first_ungraded = self.first_ungraded or grade.reason
        elif isinstance(kind, str) and (kind in self._rewards or len(self._rewards) < MAX_KINDS):
            total = self._rewards[kind]
            total[0] += grade.reward
            total[1] += 1
        now = time.perf_counter()
        if now - self._said >= PROGRESS_SECONDS:
            self._said = now
            rate = self.num_lines / (now - self._started)
            print(f"score: {self.num_lines:,} lines, {rate:,.0f}/s", file=sys.stderr, flush=True)

    def service_failed(self, reason: str) -> None:
        self.num_service_failures += 1
        self.first_service_failure = self.first_service_failure or reason

    def summary(self) -> str:
        """Lines, how many could be graded, mean reward by kind, failures, time; and on a line of
        its own why the first could not."""
        counts = self._pool.snapshot()
        parts = [
            f"{self.num_lines:,} lines",
            f"{self.num_lines - self.num_ungraded:,} graded",
            f"{self.num_ungraded:,} could not be graded",
        ]
        parts += [f"{counts[name]:,} {what}" for name, what in FAILURES.items()]
        means = [
            f"{kind} {total / count:.3f} ({count:,})"
            for kind, (total, count) in sorted(self._rewards.items())
        ]
        seconds = duration(time.perf_counter() - self._started)
        why = f"\nscore: the first that could not: {self.first_ungraded}"
        return (
            f"score: {', '.join(parts)}; mean reward {', '.join(means) or '-'}; {seconds}"
            f"{why if self.num_ungraded else ''}"
        )
