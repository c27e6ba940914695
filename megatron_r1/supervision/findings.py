"""What a look at one role brings: a sentence, the evidence for it, and what may be killed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """headline: what this role is at, in a sentence. details: lines of evidence. mend: ends what
    hangs, so that what is there for its death starts it again; None where there is no such thing.
    """

    role: str
    headline: str
    details: list[str] = field(default_factory=list)
    mend: Callable[[], Awaitable[None]] | None = None


def indented(lines: list[str], by: int = 4) -> list[str]:
    return [" " * by + line for text in lines for line in text.splitlines()]


def seconds(value: float) -> str:
    """A duration, short: "12 s", "3 min", "2.5 h"."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7_200 else f"{value / 3600:.1f} h"
