"""Answers that a scorer of reasoning-gym 0.1.25 pays although they are wrong.

Found by asking every task for constant answers and for its own answer with a digit changed or
something added (tests/unit/rewards/test_logic_guards.py does it for all tasks)."""

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
COMPLEX = re.compile(r"[\d.eE+\-*ij()\s\u2212]*")
RELATIVE_ERROR = Fraction(1, 1000)


def _numbers_given(answer: str, entry: dict[str, Any]) -> str:
    """Refuse a formula of other numbers: the scorer asks for any four in range, `6*4*1*1`."""
    used = Counter(int(number) for number in re.findall(r"\d+", answer))
    given = Counter(entry["metadata"]["numbers"])
    return "" if used == given else f"it has to use {sorted(given.elements())}, each once"


def _finite(answer: str, entry: dict[str, Any]) -> str:
    """Refuse NaN and infinity: the scorer's min(1.0, NaN) is 1."""
    return "" if COMPLEX.fullmatch(answer) else "no complex number"


def _truth_value(answer: str, entry: dict[str, Any]) -> str:
    """Refuse all but the words: the scorer takes any text that is not empty for True."""
    expected = str(entry["answer"])
    is_same = answer.strip(" .").lower() == expected.lower()
    return "" if is_same else "it is not True or False, as the question has it"


def _near(answer: str, entry: dict[str, Any]) -> str:
    """Refuse probabilities that are off by more than a thousandth: the scorer's error is absolute,
    and 0 is near every probability below 1e-4."""
    try:
        value = Fraction(answer.replace(",", "").strip())
    except (ValueError, ZeroDivisionError):
        return "no number or fraction"
    expected = Fraction(str(entry["answer"]))
    return "" if abs(value - expected) <= RELATIVE_ERROR * expected else "another probability"


def _one_number(answer: str, entry: dict[str, Any]) -> str:
    """Refuse several numbers: the scorer reads the first."""
    return "" if len(NUMBER.findall(answer)) == 1 else "it is not one number"


def _as_many_words(answer: str, entry: dict[str, Any]) -> str:
    """Refuse additions: the scorer compares the beginning."""
    expected = str(entry["answer"]).replace(",", " ").split()
    found = answer.replace(",", " ").split()
    return "" if len(found) <= len(expected) else "it is longer than an answer can be"


def _one_fraction(answer: str, entry: dict[str, Any]) -> str:
    """Refuse a second number or fraction: the scorer reads the first."""
    return "" if len(re.findall(r"\d+", answer)) == 2 else "it is not one fraction"


def _only_moves(answer: str, entry: dict[str, Any]) -> str:
    """Refuse all but moves: the scorer passes over other signs."""
    return "" if re.fullmatch(r"[UDLRudlr\s]*", answer) else "it has signs that are no moves"


def _flat_actions(answer: str, entry: dict[str, Any]) -> str:
    """Refuse JSON that is no list of steps, each with actions by agent, as the question asks."""
    try:
        steps = json.loads(answer)
    except ValueError:
        return "no JSON"
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        return ""
    return "it is not a list of steps, each {agent: action}"


GUARDS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "boxnet": _flat_actions,
    "coin_flip": _near,
    "complex_arithmetic": _finite,
    "fraction_simplification": _one_fraction,
    "game_of_life_halting": _truth_value,
    "gsm_symbolic": _one_number,
    "kakurasu": _as_many_words,
    "letter_jumble": _as_many_words,
    "puzzle24": _numbers_given,
    "sokoban": _only_moves,
    "word_sorting": _as_many_words,
}
"""The guard of each task: it returns why an answer is refused, or ""."""
