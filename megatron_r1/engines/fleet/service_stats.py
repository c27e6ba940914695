"""The recent service of an engine: its speed, and the number of unusable replies; which engines are
far slower than the others."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

RATE_SECONDS = 60.0
"""Seconds over which `tokens_per_second` is averaged."""
RECENT_REPLIES = 100
MANY_FAULTS = 3
"""Unusable replies among the last RECENT_REPLIES that count as a defect: one may be a dropped
connection, two an accident."""
SLOW_FRACTION = 0.25
"""The share of the other engines' median rate below which an engine is slow. Equal engines differ
by less than a factor of two, also while one has long responses left and another short ones."""
ENOUGH_GROUPS = 8
"""Groups of each engine before they are compared."""
STATS_SECONDS = 300.0
"""Window of `find_slow`: longer than a push, a cold cache or another program on its host take."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class ServedGroup:
    """A group that came back at time `at`, `seconds` after its request.

    Attributes:
        at: time.monotonic() of the reply.
        seconds: from the request to the reply.
        tokens: the tokens of all its responses.
        longest: the tokens of its longest response.
    """

    at: float
    seconds: float
    tokens: int
    longest: int


class ServiceStats:
    """The service of one engine in the last `window` seconds. Times are time.monotonic()."""

    def __init__(self, started_at: float, window: float) -> None:
        self.started_at, self.window = started_at, window
        self._groups: deque[ServedGroup] = deque()
        self._faults: deque[bool] = deque(maxlen=RECENT_REPLIES)

    def add(self, group: ServedGroup) -> None:
        """Count a served group, and forget those that are too old."""
        self._faults.append(False)
        self._groups.append(group)
        self._drop_old_groups(group.at)

    def add_fault(self) -> bool:
        """Count an unusable reply; return whether too many of the last ones were unusable."""
        self._faults.append(True)
        return sum(self._faults) >= MANY_FAULTS

    def tokens_per_second(self, timestamp: float, within: float = RATE_SECONDS) -> float:
        """Return the rate of groups that came back, whenever their tokens were sampled."""
        seconds = min(within, timestamp - self.started_at)
        tokens = sum(group.tokens for group in self._groups if group.at > timestamp - within)
        return tokens / seconds if seconds > 0 else 0.0

    def sequence_speed(self) -> float:
        """Return the tokens per second of one sequence: the median over groups of the longest."""
        speeds = [group.longest / group.seconds for group in self._groups if group.seconds > 0]
        return median(speeds) if speeds else 0.0

    def is_known(self, timestamp: float) -> bool:
        """Return whether the engine has served for a whole window, and enough groups in it to be
        compared with others."""
        self._drop_old_groups(timestamp)
        return timestamp - self.started_at >= self.window and len(self._groups) >= ENOUGH_GROUPS

    def _drop_old_groups(self, timestamp: float) -> None:
        while self._groups and self._groups[0].at <= timestamp - self.window:
            self._groups.popleft()


def find_slow(stats_by_engine: Mapping[Key, ServiceStats], timestamp: float) -> dict[Key, str]:
    """Return engines far slower than the others over a whole window, and by how much, in words.

    An engine with few tokens in all may simply have had little to do, and one whose sequences are
    slow may have had more of them than the others: only both together make it slow. The only engine
    is never slow, nor is one without enough groups to compare."""
    known_stats = {
        key: stats for key, stats in stats_by_engine.items() if stats.is_known(timestamp)
    }
    slow_engines = {}
    for key, stats in known_stats.items():
        other_engines = [engine_stats for name, engine_stats in known_stats.items() if name != key]
        if not other_engines:
            continue
        speed = stats.sequence_speed()
        usual_speed = median(engine_stats.sequence_speed() for engine_stats in other_engines)
        rate = stats.tokens_per_second(timestamp, stats.window)
        usual_rate = median(
            engine_stats.tokens_per_second(timestamp, engine_stats.window)
            for engine_stats in other_engines
        )
        if speed < SLOW_FRACTION * usual_speed and rate < SLOW_FRACTION * usual_rate:
            slow_engines[key] = (
                f"made {speed:.3g} tokens a second and sequence, the others {usual_speed:.3g}, for "
                f"{stats.window:g} seconds"
            )
    return slow_engines
