"""The result of inspecting one role: a headline, evidence, and how to recover it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """headline: the role's state in one sentence. details: lines of evidence. recover: kills what
    hangs, so that its supervisor starts it again; None where that is not possible."""

    role: str
    headline: str
    details: list[str] = field(default_factory=list)
    recover: Callable[[], Awaitable[None]] | None = None


def indented(lines: list[str], by: int = 4) -> list[str]:
    return [" " * by + line for text in lines for line in text.splitlines()]


def seconds(value: float) -> str:
    """Format a duration as "12 s", "3 min" or "2.5 h"."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7_200 else f"{value / 3600:.1f} h"
