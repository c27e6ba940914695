"""Multiple choice whose choices are columns of their own, beside the question."""

from collections.abc import Mapping
from typing import Any

from megatron_r1.rewards.nested_text import decoded
from megatron_r1.rewards.truths import COMPARED

NAMES = ("choices", "options", "endings")


def require_shown(kind: str, question: str, truth: Any, fields: Mapping[str, Any]) -> None:
    """Raise ValueError where a truth is the number or letter of a choice (MMLU, ARC) that the
    question does not have: no response could name it for a reason."""
    for name in NAMES if kind in COMPARED else ():
        choices = decoded(fields.get(name))
        if isinstance(choices, Mapping):
            choices = choices.get("text")  # ARC's
        if not isinstance(choices, list) or len(choices) < 2 or not _is_place(truth, len(choices)):
            continue
        asked = _letters(question)
        if not all(_letters(str(choice)) in asked for choice in choices):
            raise ValueError(
                f"{truth!r} is one of the {len(choices)} choices in {name!r}, which the question "
                "does not have; write them into the question, or give the text of the right one"
            )


def _is_place(truth: Any, count: int) -> bool:
    """Return whether a truth is the number or the letter of one of `count` choices."""
    if isinstance(truth, int) and not isinstance(truth, bool):
        return 0 <= truth < count
    if not isinstance(truth, str) or len(plain := truth.strip(" ().").upper()) != 1:
        return False
    return plain.isdigit() or 0 <= ord(plain) - ord("A") < count


def _letters(text: str) -> str:
    return "".join(text.casefold().split())
