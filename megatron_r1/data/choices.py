"""Multiple choice whose choices are columns of their own, besides the question."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from r1_grading.base.values import decoded
from r1_grading.truths import COMPARED

NAMES = ("choices", "options", "endings")
COLUMNS = (("A", "B", "C", "D", "E"), ("a", "b", "c", "d", "e"), ("opa", "opb", "opc", "opd"))
"""Choices that have a column each: CMMLU's, MedMCQA's."""
LETTERED = re.compile(r"(?:^|[\s,;|])\(?[A-Ea-e]\s{0,2}[).:]\s*")
"""What stands before each of the choices in a text: `a ) 400 , b ) 300`."""


def require_shown(kind: str, question: str, truth: Any, fields: Mapping[str, Any]) -> None:
    """Raise ValueError where a truth is the number or letter of a choice (MMLU, ARC) that the
    question does not have: no response could name it for a reason."""
    for name, choices in _choices(fields) if kind in COMPARED else ():
        if not isinstance(choices, list) or len(choices) < 2 or not _is_place(truth, len(choices)):
            continue
        asked = _letters(question)
        if not all(_letters(str(choice)) in asked for choice in choices):
            raise ValueError(
                f"{truth!r} is one of the {len(choices)} choices in {name!r}, which the question "
                "does not have; write them into the question, or give the text of the right one"
            )


def _choices(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, choices) of what may be choices: a list of them, or another value."""
    for name in NAMES:
        choices = decoded(fields.get(name))
        if isinstance(choices, Mapping):  # ARC's, or letter → text
            choices = choices["text"] if "text" in choices else list(choices.values())
        elif isinstance(choices, str):
            choices = [part.strip(" ,;|") for part in LETTERED.split(choices)[1:]]
        yield name, choices
    for columns in COLUMNS:
        texts = [fields[name] for name in columns if fields.get(name) not in (None, "")]
        yield ", ".join(columns), texts


def _is_place(truth: Any, count: int) -> bool:
    """Return whether a truth is the number or the letter of one of `count` choices."""
    if isinstance(truth, int) and not isinstance(truth, bool):
        return 0 <= truth < count
    if not isinstance(truth, str) or len(plain := truth.strip(" ().").upper()) != 1:
        return False
    return plain.isdigit() or 0 <= ord(plain) - ord("A") < count


def _letters(text: str) -> str:
    return "".join(text.casefold().split())
