"""The part of a response that a filter checks."""

from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK

PARTS = ("thought", "response")


def judged_part(response: TextResponse, part: object) -> str | None:
    """Return the thought, None without one; or the whole response with a line break for every tag.
    Raises ValueError for another part."""
    if part == "thought":
        return response.thought
    if part != "response":
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    text = response.text
    for tag in (THINK, END_THINK, ANSWER, END_ANSWER):
        text = text.replace(tag, "\n")
    return text
