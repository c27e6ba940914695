"""An episode of several turns as a report shows it: a conversation, what was trained beside it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.reporting.wording import counted, finite, printable, shorten

MAX_TURNS = 40
"""Turns shown; of a longer episode the first and the last ones."""
MAX_CHARACTERS = 2000
"""Characters of one turn that are shown."""
CALL = re.compile(r"(<tool_call>.*?</tool_call>)", re.DOTALL)


@dataclass(frozen=True)
class ShownTurn:
    """One message. text: (tag, text) segments; tag: "", i (faint) or b (a tool call). details: its
    tokens, whether they were trained or given, and the policy that sampled them."""

    role: str
    is_trained: bool
    details: str
    text: list[tuple[str, str]]


def conversation(sample: Mapping[str, Any]) -> list[ShownTurn]:
    """Return the turns of a line of samples.jsonl; empty for a single turn."""
    turns = sample.get("turns")
    if not isinstance(turns, list):
        return []
    shown = [_shown(turn) for turn in turns if isinstance(turn, Mapping)]
    if len(shown) <= MAX_TURNS:
        return shown
    half = MAX_TURNS // 2
    gap = ShownTurn("…", False, f"{len(shown) - 2 * half:,} turns left out", [])
    return [*shown[:half], gap, *shown[-half:]]


def _shown(turn: Mapping[str, Any]) -> ShownTurn:
    is_trained, tokens = bool(turn.get("trained")), finite(turn, "tokens")
    version = finite(turn, "policy_version")
    details = [
        "" if tokens is None else counted(int(tokens), "token"),
        "trained" if is_trained else "given",
        "" if version is None else f"policy {version:.0f}",
    ]
    text = str(turn.get("text") or "")
    return ShownTurn(
        printable(turn.get("role", "")),
        is_trained,
        " · ".join(detail for detail in details if detail),
        list(_segments(printable(shorten(text, MAX_CHARACTERS).strip(), keep_newlines=True))),
    )


def _segments(text: str) -> Iterator[tuple[str, str]]:
    if not text:
        yield "i", "(empty)"
    for part in CALL.split(text):
        if part:
            yield "b" if CALL.fullmatch(part) else "", part
