"""How well an engine has served lately: how fast, and how often its answers could be used."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

SHOWN_SECONDS = 60.0
"""tokens_per_second is an average over so long."""
RECENT_ANSWERS = 100
MANY_FAULTS = 3
"""Of the last RECENT_ANSWERS answers: one may be a dropped connection, two an accident."""
SLOW_SHARE = 0.25
"""Of the other engines' median. Equal engines differ by less than a factor of two, also while one
has long answers left and another short ones."""
ENOUGH_ANSWERS = 8
"""Groups of each engine before they are compared."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Answer:
    """One group that came back at time `at`, `seconds` after it was asked for. longest: tokens of
    its longest response."""

    at: float
    seconds: float
    tokens: int
    longest: int


class Pace:
    """What one engine did in the last `window` seconds. Times are time.monotonic()."""

    def __init__(self, began: float, window: float) -> None:
        self.began, self.window = began, window
        self._answers: deque[Answer] = deque()
        self._faults: deque[bool] = deque(maxlen=RECENT_ANSWERS)

    def answered(self, answer: Answer) -> None:
        self._faults.append(False)
        self._answers.append(answer)
        self._forget(answer.at)

    def failed(self) -> bool:
        """An answer could not be used; whether too many of the last could not."""
        self._faults.append(True)
        return sum(self._faults) >= MANY_FAULTS

    def tokens_per_second(self, now: float, within: float = SHOWN_SECONDS) -> float:
        """Of groups that came back, whenever their tokens were made."""
        seconds = min(within, now - self.began)
        tokens = sum(answer.tokens for answer in self._answers if answer.at > now - within)
        return tokens / seconds if seconds > 0 else 0.0

    def sequence_speed(self) -> float:
        """Tokens per second of one sequence: the median group's longest."""
        speeds = [a.longest / a.seconds for a in self._answers if a.seconds > 0]
        return median(speeds) if speeds else 0.0

    def is_known(self, now: float) -> bool:
        """Whether it has served for a whole window, and enough in it to be compared."""
        self._forget(now)
        return now - self.began >= self.window and len(self._answers) >= ENOUGH_ANSWERS

    def _forget(self, now: float) -> None:
        while self._answers and self._answers[0].at <= now - self.window:
            self._answers.popleft()


def find_slow(paces: Mapping[Key, Pace], now: float) -> dict[Key, str]:
    """Engines far slower than the others over a whole window, and how far.

    One that makes few tokens in all may simply have had little to do, and one whose sequences are
    slow may have had more of them than the others: only both together say that it is slow. Never
    the only engine, and nobody where there are not enough answers to tell.
    """
    known = {key: pace for key, pace in paces.items() if pace.is_known(now)}
    slow = {}
    for key, pace in known.items():
        others = [other for name, other in known.items() if name != key]
        if not others:
            continue
        speed, usual = pace.sequence_speed(), median(o.sequence_speed() for o in others)
        made, made_usually = (
            pace.tokens_per_second(now, pace.window),
            median(o.tokens_per_second(now, o.window) for o in others),
        )
        if speed < SLOW_SHARE * usual and made < SLOW_SHARE * made_usually:
            slow[key] = (
                f"made {speed:.3g} tokens a second and sequence, the others {usual:.3g}, for "
                f"{pace.window:g} seconds"
            )
    return slow
