"""Programs in a chain of thought about something else."""

import re
from collections.abc import Sequence

from megatron_r1.curation.filters.part import judged_part
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse

FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)


def code_blocks(
    response: TextResponse,
    prompt: Prompt,
    *,
    kinds: Sequence[str] = ("code",),
    part: str = "thought",
) -> str:
    """Drop a response with a fenced code block, also one that is never closed. kinds: of questions
    whose responses may have them. Raises ValueError if it is no list."""
    if isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"kinds must be a list of kinds of questions, got {kinds!r}")
    text = judged_part(response, part)
    if prompt.kind in kinds or text is None:
        return ""
    return "a code block" if FENCE.search(text) else ""
