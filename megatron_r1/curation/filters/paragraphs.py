"""Chains of thought in paragraphs too long to follow."""

import re

from megatron_r1.curation.filters.part import judged_part
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.language.words import HAN, HAN_PER_WORD

HAN_CHARACTER = re.compile(f"[{HAN}]")
FENCED = re.compile(r"```(?:[^`]|`(?!``))*+```")


def long_paragraphs(
    response: TextResponse, prompt: Prompt, *, max_words: int = 300, part: str = "thought"
) -> str:
    """Drop a response with a paragraph of more than `max_words` words; a line break ends one.

    Words are separated by spaces, and may be numbers and formulae; 1.7 Chinese characters are one
    (`rewards.language.words`), so that a page counts alike in both languages. Code blocks are left
    to `code_blocks`. Raises ValueError for a limit that is no positive number.
    """
    if isinstance(max_words, bool) or not isinstance(max_words, int | float) or max_words <= 0:
        raise ValueError(f"max_words must be a positive number, got {max_words!r}")
    text = FENCED.sub("\n", judged_part(response, part) or "")
    longest = max((num_words(paragraph) for paragraph in text.splitlines()), default=0.0)
    return f"a paragraph of {longest:,.0f} words" if longest > max_words else ""


def num_words(paragraph: str) -> float:
    others, num_han = HAN_CHARACTER.subn(" ", paragraph)
    return len(re.findall(r"\S*\w\S*", others)) + num_han / HAN_PER_WORD
