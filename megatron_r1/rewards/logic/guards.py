"""Answers that a scorer of reasoning-gym 0.1.25 pays although they are wrong.

Found by asking every task for constant answers and for its own answer with a digit changed or
something added (tests/unit/rewards/test_logic_guards.py does it for all tasks)."""

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

ONE_NUMBER = re.compile(r"\s*\$?(-?\d[\d,]{0,99}(?:\.\d{1,100})?)\s*%?[\s.]*")
"""A number of bounded length: Fraction raises ValueError for more than 4,300 digits."""
NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
STATEMENT = r"\w+ is an? \w+"
COMPLEX = re.compile(r"[\d.eE+\-*ij()\s\u2212]*")
MOVES_PER_NEEDED = 10
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


def _the_number(answer: str, entry: dict[str, Any]) -> str:
    """Refuse another number, and words around one: the scorer reads the first, without its sign."""
    match = ONE_NUMBER.fullmatch(answer)
    if match is None:
        return "it is not one number"
    is_same = Fraction(match[1].replace(",", "")) == Fraction(str(entry["answer"]))
    return "" if is_same else "another number"


def _as_many_words(answer: str, entry: dict[str, Any]) -> str:
    """Refuse additions: the scorer compares the beginning."""
    expected = str(entry["answer"]).replace(",", " ").split()
    found = answer.replace(",", " ").split()
    return "" if len(found) <= len(expected) else "it is longer than an answer can be"


def _made_of(pattern: str, what: str) -> Callable[[str, dict[str, Any]], str]:
    """Return a guard that refuses what is not `pattern` as a whole: the scorer passes over other
    text, such as the words of `it is not 1/2`."""
    form = re.compile(pattern)
    return lambda answer, entry: "" if form.fullmatch(answer.strip()) else f"it is not {what}"


def _as_long(answer: str, entry: dict[str, Any]) -> str:
    """Refuse additions: the shares that the scorer gives for letters may add up to more than 1."""
    return "" if len(answer) <= len(str(entry["answer"])) else "it is longer than the answer"


def _statements(answer: str, entry: dict[str, Any]) -> str:
    """Refuse all but one statement for each person: the scorer looks for such statements within any
    text, and a denial is none of them."""
    count = len(re.findall(STATEMENT, str(entry["answer"])))
    parts = [part.strip() for part in re.split(r"[.,;\n]|\band\b", answer)]
    parts = [part for part in parts if part]
    is_plain = len(parts) == count and all(re.fullmatch(STATEMENT, part) for part in parts)
    return "" if is_plain else f"it is not {count} statements, each <name> is a <role>"


def _flat_actions(answer: str, entry: dict[str, Any]) -> str:
    """Refuse JSON that is no list of steps, each with actions by agent, as the question asks."""
    try:
        steps = json.loads(answer)
    except (ValueError, RecursionError):
        return "no JSON that can be read"
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        return ""
    return "it is not a list of steps, each {agent: action}"


def _few_moves(answer: str, entry: dict[str, Any]) -> str:
    """Refuse random walks, which end at the exit now and then: the scorer sets no limit, and passes
    over moves that are not possible."""
    most = MOVES_PER_NEEDED * entry["metadata"]["min_moves"]
    is_plain = re.fullmatch(r"(?:[A-Z][+-]\d+[\s,]*)+", answer.strip())
    if is_plain and len(re.findall(r"[+-]", answer)) <= most:
        return ""
    return f"it is not up to {most} moves, each as F+1"


GUARDS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "advanced_geometry": _made_of(
        rf"{NUMBER}\s*°?|\(?\s*{NUMBER}\s*,\s*{NUMBER}\s*\)?", "one value"
    ),
    "boxnet": _flat_actions,
    "coin_flip": _near,
    "complex_arithmetic": _finite,
    "fraction_simplification": _made_of(
        r"\$?\s*(?:\\[dt]?frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}|-?\d+\s*/\s*-?\d+)\s*\$?\.?",
        "one fraction",
    ),
    "game_of_life_halting": _truth_value,
    "gsm_symbolic": _the_number,
    "kakurasu": _made_of(r"[01\s]*", "rows of 0 and 1"),
    "knights_knaves": _statements,
    "letter_jumble": _as_many_words,
    "polynomial_equations": _made_of(rf"{NUMBER}(?:\s*,\s*{NUMBER})*|", "numbers between commas"),
    "puzzle24": _numbers_given,
    "quantum_lock": _made_of(r"[A-Ca-c\s,→>-]*", "buttons between arrows"),
    "rush_hour": _few_moves,
    "sokoban": _made_of(r"[UDLRudlr\s]*", "moves"),
    "survo": _made_of(r"[\d\s-]*", "rows of numbers"),
    "spell_backward": _as_long,
    "time_intervals": _made_of(
        r"(?:\d+ days?)?[\s,]*(?:\d+:\d+(?::\d+(?:\.\d+)?)?)?", "days, or a time"
    ),
    "word_sorting": _as_many_words,
}
"""The guard of each task: it returns why an answer is refused, or "". A guard raises for a faulty
entry only, never for an answer: the response would be left out instead of getting 0."""
