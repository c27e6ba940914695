"""Programs in a chain of thought that is not about programming."""

import re
from collections.abc import Sequence

from megatron_r1.curation.candidate import Candidate
from megatron_r1.curation.filters.part import judged_part
from megatron_r1.data.prompts import Prompt

FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)


def code_blocks(
    candidate: Candidate,
    prompt: Prompt,
    *,
    kinds: Sequence[str] = ("code",),
    part: str = "thought",
) -> str:
    """A fenced code block, also one that is never closed. kinds: of questions that may have them.
    Raises ValueError for kinds that are no list."""
    if isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"kinds must be a list of kinds of questions, got {kinds!r}")
    text = judged_part(candidate, part)
    if prompt.kind in kinds or text is None:
        return ""
    return "a code block" if FENCE.search(text) else ""
