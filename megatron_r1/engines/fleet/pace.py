"""Measures an engine's recent service: its speed, and the number of unusable replies."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

SHOWN_SECONDS = 60.0
"""Seconds over which `tokens_per_second` is averaged."""
RECENT_REPLIES = 100
MANY_FAULTS = 3
"""Unusable replies among the last RECENT_REPLIES that count as a defect: one may be a dropped
connection, two an accident."""
SLOW_SHARE = 0.25
"""The share of the other engines' median rate below which an engine is slow. Equal engines differ
by less than a factor of two, also while one has long responses left and another short ones."""
ENOUGH_GROUPS = 8
"""Groups of each engine before they are compared."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class ServedGroup:
    """A group that came back at time `at`, `seconds` after its request. tokens: the tokens of all
    its responses. longest: the tokens of its longest response."""

    at: float
    seconds: float
    tokens: int
    longest: int


class Pace:
    """The service of one engine in the last `window` seconds. Times are time.monotonic()."""

    def __init__(self, began: float, window: float) -> None:
        self.began, self.window = began, window
        self._groups: deque[ServedGroup] = deque()
        self._faults: deque[bool] = deque(maxlen=RECENT_REPLIES)

    def add(self, group: ServedGroup) -> None:
        self._faults.append(False)
        self._groups.append(group)
        self._forget(group.at)

    def add_fault(self) -> bool:
        """Count an unusable reply; return whether too many of the last ones were unusable."""
        self._faults.append(True)
        return sum(self._faults) >= MANY_FAULTS

    def tokens_per_second(self, now: float, within: float = SHOWN_SECONDS) -> float:
        """Return the rate of groups that came back, whenever their tokens were sampled."""
        seconds = min(within, now - self.began)
        tokens = sum(group.tokens for group in self._groups if group.at > now - within)
        return tokens / seconds if seconds > 0 else 0.0

    def sequence_speed(self) -> float:
        """Return the tokens per second of one sequence: the median over groups of the longest."""
        speeds = [group.longest / group.seconds for group in self._groups if group.seconds > 0]
        return median(speeds) if speeds else 0.0

    def is_known(self, now: float) -> bool:
        """Return whether the engine has served for a whole window, and enough groups in it to be
        compared with others."""
        self._forget(now)
        return now - self.began >= self.window and len(self._groups) >= ENOUGH_GROUPS

    def _forget(self, now: float) -> None:
        while self._groups and self._groups[0].at <= now - self.window:
            self._groups.popleft()


def find_slow(paces: Mapping[Key, Pace], now: float) -> dict[Key, str]:
    """Return engines far slower than the others over a whole window, and by how much, in words.

    An engine with few tokens in all may simply have had little to do, and one whose sequences are
    slow may have had more of them than the others: only both together make it slow. The only engine
    is never slow, nor is one without enough groups to compare."""
    known = {key: pace for key, pace in paces.items() if pace.is_known(now)}
    slow = {}
    for key, pace in known.items():
        others = [other for name, other in known.items() if name != key]
        if not others:
            continue
        speed = pace.sequence_speed()
        usual_speed = median(other.sequence_speed() for other in others)
        rate = pace.tokens_per_second(now, pace.window)
        usual_rate = median(other.tokens_per_second(now, other.window) for other in others)
        if speed < SLOW_SHARE * usual_speed and rate < SLOW_SHARE * usual_rate:
            slow[key] = (
                f"made {speed:.3g} tokens a second and sequence, the others {usual_speed:.3g}, for "
                f"{pace.window:g} seconds"
            )
    return slow
