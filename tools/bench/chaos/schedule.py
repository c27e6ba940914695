"""Which fault when: a seeded list, every kind before any comes again, one fault at a time - or,
seldom, one while the run still recovers from the one before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .faults import FAULTS, Scene

OVERLAP = 0.15
"""Chance that the next fault does not wait for the run to recover."""
LATEST_RECOVERY_SECONDS = 420.0


@dataclass
class Report:
    """Of one fault. step: the last one finished when it was done; seconds_to_next_step: from its
    beginning until one more than ever before was finished."""

    fault: str
    step: int
    at_seconds: float
    what: str
    seconds_to_next_step: float | None = None


def order(names: list[str], draw: random.Random) -> Iterator[str]:
    """Endless: all of them in some order, then all in another."""
    while True:
        yield from draw.sample(names, len(names))


def disturb(
    scene: Scene,
    names: list[str],
    steps: int,
    gap: tuple[int, int],
    draw: random.Random,
    tell: Callable[[Report], Any] = print,
) -> list[Report]:
    """Break things until the run is done. gap: steps between a recovery and the next fault."""
    user, reports = scene.user, []
    faults = order(names, draw)
    _until(user, lambda: user.best >= 1)
    num_told, wait = 0, draw.randint(1, gap[0])
    while not user.is_done:
        due = user.best + wait
        _until(user, lambda due=due: user.best >= min(due, steps - 1))
        if user.best >= steps - 1:
            break
        user.follow(draw.uniform(0.0, 1.5))  # into any phase of a step
        reports.append(_inject(scene, next(faults), draw))
        if draw.random() < OVERLAP and user.best < steps - 1:
            user.follow(draw.uniform(0.0, 20.0))
            reports.append(_inject(scene, next(faults), draw))
        at = reports[-1].step
        _until(user, lambda at=at: user.best > at)
        for report in reports[num_told:]:
            later = [seen.seconds for seen in user.sightings if seen.line["step"] > report.step]
            if later:  # else it came in the run's last step, or after
                report.seconds_to_next_step = round(later[0] - report.at_seconds, 2)
            tell(report)
        num_told, wait = len(reports), draw.randint(*gap)
    _until(user, lambda: user.is_done)
    return reports


def _inject(scene: Scene, name: str, draw: random.Random) -> Report:
    """Do it as soon as there is what it breaks. Raises RuntimeError where that never comes."""
    user = scene.user
    deadline = user.seconds + LATEST_RECOVERY_SECONDS
    while user.seconds < deadline:
        seconds = user.seconds
        what = FAULTS[name](scene, draw)
        if what or user.is_done:
            return Report(name, user.best, round(seconds, 2), what or "came too late")
        user.follow(0.02)
    raise RuntimeError(f"nothing found to do this to after step {user.best}: {name}")


def _until(user, is_so: Callable[[], bool]) -> None:
    deadline = user.seconds + LATEST_RECOVERY_SECONDS
    while not is_so() and not user.is_done:
        user.follow(0.1)
        if user.seconds > deadline:
            raise RuntimeError(f"stuck after step {user.best} for {LATEST_RECOVERY_SECONDS:.0f} s")


def as_dicts(reports: list[Report]) -> list[dict[str, Any]]:
    return [asdict(report) for report in reports]
