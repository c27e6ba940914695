"""Which part of an answer a filter looks at."""

from __future__ import annotations

from megatron_r1.curation.candidate import Candidate
from megatron_r1.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK

PARTS = ("thought", "response")


def judged_part(candidate: Candidate, part: object) -> str | None:
    """thought: None where there is none; response: all of it, a line break for every tag. Raises
    ValueError for another part."""
    if part == "thought":
        return candidate.thought
    if part != "response":
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    text = candidate.text
    for tag in (THINK, END_THINK, ANSWER, END_ANSWER):
        text = text.replace(tag, "\n")
    return text
