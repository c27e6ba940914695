"""What of a question and a response a model is shown.

A reward model is trained on the texts it is later asked about, so both go through here.
"""

from __future__ import annotations

import re
from typing import Literal

from megatron_r1.rewards.answer import THINK, Extraction, after_thought
from megatron_r1.rewards.remote.untrusted_text import break_control_tokens, cut_middle

Part = Literal["summary", "response"]
PLACES = re.compile(r"\{(question|response)\}")


def prepare_texts(
    question: str, response: str, part: Part, opened: bool, max_chars: int
) -> tuple[str, Extraction]:
    """The question and that part of the response, without control tokens and at most about
    `max_chars` of it; the part's text is None where there is none."""
    found = response_part(response, part, opened)
    if found.text is not None:
        found = Extraction(cut_middle(break_control_tokens(found.text), max_chars))
    return break_control_tokens(question), found


def fill_template(template: str, question: str, response: str) -> str:
    """`template` with both texts in their places."""
    texts = {"question": question, "response": response}
    # One pass: a question that contains "{response}" keeps it.
    return PLACES.sub(lambda place: texts[place[1]], template)


def chat_messages(question: str, response: str) -> list[dict[str, str]]:
    """Both texts as a chat template takes them."""
    return [
        {"role": role, "content": text}
        for role, text in (("user", question), ("assistant", response))
    ]


def check_template(template: str | None) -> str | None:
    """`template` as it is. Raises ValueError for one without a place for the response."""
    if template is not None and "{response}" not in template:
        raise ValueError(f"template must contain {{response}}, got {template!r}")
    return template


def response_part(response: str, part: Part, opened: bool) -> Extraction:
    """summary: what follows the thought, stripped; a thought that is never closed has none, and a
    response without a thought is all summary. response: all of it, the thought included.

    opened: the prompt ended with `<think>`, which the whole response then gets back.
    """
    if part == "response":
        text = THINK + response if opened else response
        return Extraction(text) if response.strip() else Extraction(None, "the response is empty")
    summary = after_thought(response, opened)
    if summary is None:
        return Extraction(None, "no summary: the thought is never closed")
    summary = summary.strip()
    return Extraction(summary) if summary else Extraction(None, "no summary: it is empty")
