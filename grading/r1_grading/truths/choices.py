"""Rows of questions with choices: whether the truth is one of the choices."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from r1_grading.base.values import decode_literal
from r1_grading.truths.truth_values import COMPARING_REWARDS

CHOICE_NAMES = ("choices", "options", "endings")
CHOICE_COLUMNS = (
    ("A", "B", "C", "D", "E"),
    ("a", "b", "c", "d", "e"),
    ("opa", "opb", "opc", "opd"),
)
"""Choices that have a column each: CMMLU's, MedMCQA's."""
LETTERED_CHOICES = re.compile(r"(?:^|[\s,;|])\(?[A-Ea-e]\s{0,2}[).:]\s*")
"""What stands before each of the choices in a text: `a ) 400 , b ) 300`."""


def check_choice(kind: str, question: str, truth: Any, fields: Mapping[str, Any]) -> None:
    """Raise ValueError where a truth is a choice that the question does not have.

    It is the number or letter of one (MMLU, ARC), which no response could name for a reason.

    Args:
        kind: the reward's name.
        question: the question's text.
        truth: its truth.
        fields: the row's other columns."""
    for name, choices in _named_choices(fields) if kind in COMPARING_REWARDS else ():
        if not isinstance(choices, list) or len(choices) < 2 or not _is_place(truth, len(choices)):
            continue
        question_letters = _compact_text(question)
        if not all(_compact_text(str(choice)) in question_letters for choice in choices):
            raise ValueError(
                f"{truth!r} is one of the {len(choices)} choices in {name!r}, which the question "
                "does not have; write them into the question, or give the text of the right one"
            )


def _named_choices(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, choices) of what may be choices: a list of them, or another value."""
    for name in CHOICE_NAMES:
        choices = decode_literal(fields.get(name))
        if isinstance(choices, Mapping):  # ARC's, or letter → text
            choices = choices["text"] if "text" in choices else list(choices.values())
        elif isinstance(choices, str):
            choices = [part.strip(" ,;|") for part in LETTERED_CHOICES.split(choices)[1:]]
        yield name, choices
    for columns in CHOICE_COLUMNS:
        texts = [fields[name] for name in columns if fields.get(name) not in (None, "")]
        yield ", ".join(columns), texts


def _is_place(truth: Any, count: int) -> bool:
    """Return whether a truth is the number or the letter of one of `count` choices."""
    if isinstance(truth, int) and not isinstance(truth, bool):
        return 0 <= truth < count
    if not isinstance(truth, str) or len(mark := truth.strip(" ().").upper()) != 1:
        return False
    return mark.isdigit() or 0 <= ord(mark) - ord("A") < count


def _compact_text(text: str) -> str:
    return "".join(text.casefold().split())
