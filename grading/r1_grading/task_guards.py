"""Refuses answers that a scorer of reasoning-gym 0.1.25 pays although they are wrong.

They were found by asking every task for constant answers and for its own answer with a digit
changed or something added (tests/grading/test_logic.py does it for all tasks)."""

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

ONE_NUMBER = re.compile(r"\s*\$?(-?\d[\d,]{0,99}(?:\.\d{1,100})?)\s*%?[\s.]*")
"""A number of bounded length: Fraction raises ValueError for more than 4,300 digits."""
NUMBER_PATTERN = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
ROLE_STATEMENT = r"\w+ is an? \w+"
COMPLEX = re.compile(r"[\d.eE+\-*ij()\s\u2212]*")
MOVES_PER_NEEDED = 10
RELATIVE_ERROR = Fraction(1, 1000)


def _refuse_other_numbers(answer: str, entry: dict[str, Any]) -> str:
    """Refuse a formula of other numbers: the scorer asks for any four in range, `6*4*1*1`."""
    operands = Counter(int(number) for number in re.findall(r"\d+", answer))
    numbers = Counter(entry["metadata"]["numbers"])
    return "" if operands == numbers else f"it has to use {sorted(numbers.elements())}, each once"


def _refuse_non_finite(answer: str, entry: dict[str, Any]) -> str:
    """Refuse NaN and infinity: the scorer's min(1.0, NaN) is 1."""
    return "" if COMPLEX.fullmatch(answer) else "no complex number"


def _refuse_non_boolean(answer: str, entry: dict[str, Any]) -> str:
    """Refuse all but the words: the scorer takes any text that is not empty for True."""
    expected = str(entry["answer"])
    is_same = answer.strip(" .").lower() == expected.lower()
    return "" if is_same else "it is not True or False, as the question has it"


def _refuse_coarse_probability(answer: str, entry: dict[str, Any]) -> str:
    """Refuse probabilities that are off by more than a thousandth.

    The scorer's error is absolute, and 0 is near every probability below 1e-4."""
    try:
        value = Fraction(answer.replace(",", "").strip())
    except (ValueError, ZeroDivisionError):
        return "no number or fraction"
    expected = Fraction(str(entry["answer"]))
    return "" if abs(value - expected) <= RELATIVE_ERROR * expected else "another probability"


def _refuse_other_number(answer: str, entry: dict[str, Any]) -> str:
    """Refuse another number, and words around one: the scorer reads the first, without its sign."""
    match = ONE_NUMBER.fullmatch(answer)
    if match is None:
        return "it is not one number"
    is_same = Fraction(match[1].replace(",", "")) == Fraction(str(entry["answer"]))
    return "" if is_same else "another number"


def _refuse_extra_words(answer: str, entry: dict[str, Any]) -> str:
    """Refuse additions: the scorer compares the beginning."""
    expected = str(entry["answer"]).replace(",", " ").split()
    answer_words = answer.replace(",", " ").split()
    return "" if len(answer_words) <= len(expected) else "it is longer than an answer can be"


def _pattern_guard(pattern: str, form_name: str) -> Callable[[str, dict[str, Any]], str]:
    """Return a guard that refuses what is not `pattern` as a whole.

    The scorer passes over other text, such as the words of `it is not 1/2`."""
    form = re.compile(pattern)
    return lambda answer, entry: "" if form.fullmatch(answer.strip()) else f"it is not {form_name}"


def _refuse_longer(answer: str, entry: dict[str, Any]) -> str:
    """Refuse additions: the shares that the scorer gives for letters may add up to more than 1."""
    return "" if len(answer) <= len(str(entry["answer"])) else "it is longer than the answer"


def _refuse_extra_statements(answer: str, entry: dict[str, Any]) -> str:
    """Refuse all but one statement for each person.

    The scorer looks for such statements within any text, and also within a denial."""
    count = len(re.findall(ROLE_STATEMENT, str(entry["answer"])))
    parts = [part.strip() for part in re.split(r"[.,;\n]|\band\b", answer)]
    parts = [part for part in parts if part]
    is_plain = len(parts) == count and all(re.fullmatch(ROLE_STATEMENT, part) for part in parts)
    return "" if is_plain else f"it is not {count} statements, each <name> is a <role>"


def _refuse_malformed_actions(answer: str, entry: dict[str, Any]) -> str:
    """Refuse JSON that is no list of steps, each with actions by agent, as the question asks."""
    try:
        steps = json.loads(answer)
    except (ValueError, RecursionError):
        return "no JSON that can be read"
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        return ""
    return "it is not a list of steps, each {agent: action}"


def _refuse_many_moves(answer: str, entry: dict[str, Any]) -> str:
    """Refuse random walks, which end at the exit now and then.

    The scorer sets no limit, and passes over moves that are not possible."""
    max_moves = MOVES_PER_NEEDED * entry["metadata"]["min_moves"]
    is_plain = re.fullmatch(r"(?:[A-Z][+-]\d+[\s,]*)+", answer.strip())
    if is_plain and len(re.findall(r"[+-]", answer)) <= max_moves:
        return ""
    return f"it is not up to {max_moves} moves, each as F+1"


GUARDS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "advanced_geometry": _pattern_guard(
        rf"{NUMBER_PATTERN}\s*°?|\(?\s*{NUMBER_PATTERN}\s*,\s*{NUMBER_PATTERN}\s*\)?", "one value"
    ),
    "boxnet": _refuse_malformed_actions,
    "coin_flip": _refuse_coarse_probability,
    "complex_arithmetic": _refuse_non_finite,
    "fraction_simplification": _pattern_guard(
        r"\$?\s*(?:\\[dt]?frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}|-?\d+\s*/\s*-?\d+)\s*\$?\.?",
        "one fraction",
    ),
    "game_of_life_halting": _refuse_non_boolean,
    "gsm_symbolic": _refuse_other_number,
    "kakurasu": _pattern_guard(r"[01\s]*", "rows of 0 and 1"),
    "knights_knaves": _refuse_extra_statements,
    "letter_jumble": _refuse_extra_words,
    "polynomial_equations": _pattern_guard(
        rf"{NUMBER_PATTERN}(?:\s*,\s*{NUMBER_PATTERN})*|", "numbers between commas"
    ),
    "puzzle24": _refuse_other_numbers,
    "quantum_lock": _pattern_guard(r"[A-Ca-c\s,→>-]*", "buttons between arrows"),
    "rush_hour": _refuse_many_moves,
    "sokoban": _pattern_guard(r"[UDLRudlr\s]*", "moves"),
    "survo": _pattern_guard(r"[\d\s-]*", "rows of numbers"),
    "spell_backward": _refuse_longer,
    "time_intervals": _pattern_guard(
        r"(?:\d+ days?)?[\s,]*(?:\d+:\d+(?::\d+(?:\.\d+)?)?)?", "days, or a time"
    ),
    "word_sorting": _refuse_extra_words,
}
"""The guard of each task: it returns why an answer is refused, or "". A guard raises for a faulty
entry only, never for an answer: the response would be left out instead of getting 0."""
