"""Accuracy on procedurally generated tasks, by reasoning-gym's own scorer of each task.

A scorer that evaluates its answer gets it only after `scorer_refusal_reason` has parsed it as text
and bounded what it computes. `GUARDS` has the answers that a scorer of reasoning-gym 0.1.25 pays
although they are wrong. They were found by asking every task for constant answers and for its
own answer with a digit changed or something added (tests/grading/test_logic.py does it for all
tasks)."""

import ast
import functools
import importlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from r1_grading.base.errors import shorten
from r1_grading.reading import Reading, is_number, read_answer
from r1_grading.reading.tags_and_boxes import BOXES, delimiters_enclose, describe_comparison
from r1_grading.rewards import Grade

FORMULA_CHARS = re.compile(r"[0-9A-Za-z+\-*/^().,\s]*")
FORMULA_NAMES = frozenset(
    ("Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp")
    + ("ln", "log", "pi", "sec", "sin", "sinh", "sqrt", "tan", "tanh")
)
GROWING_FUNCTIONS = frozenset(("exp", "sinh", "cosh"))
MAX_FORMULA_CHARS = 2_000
MAX_BITS = 4_096
"""The size of any intermediate number: 1,200 digits."""
MAX_DEGREE = 64
"""Total degree in all symbols, which a scorer may expand."""


class TooLarge(ValueError):
    """Evaluating the formula could take too long."""


def is_formula(answer: str) -> bool:
    """Whether `answer` holds only numbers, operators, one-letter symbols and common functions."""
    formula = unicodedata.normalize("NFKC", answer)
    if not FORMULA_CHARS.fullmatch(formula) or re.search(r"\.\s*[A-Za-z]", formula):
        return False
    names = re.findall(r"[A-Za-z][A-Za-z0-9]*", formula)
    return all(len(name) == 1 or name in FORMULA_NAMES for name in names)


def scorer_refusal_reason(answer: str) -> str:
    """Return why a scorer must not evaluate `answer`, or "". Evaluates nothing itself."""
    if len(answer) > MAX_FORMULA_CHARS:
        return f"{len(answer)} characters, at most {MAX_FORMULA_CHARS} are evaluated"
    if not is_formula(answer):
        return "no plain formula"
    source = " ".join(unicodedata.normalize("NFKC", answer).replace("^", "**").split())
    try:
        _bound_size(ast.parse(source, mode="eval").body)
    except TooLarge as error:
        return str(error)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "no formula that can be parsed"
    return ""


def _bound_size(node: ast.expr) -> tuple[float, int]:
    """Return upper bounds of the bits of a value (or of its inverse) and of its degree."""
    match node:
        case ast.Constant(value=int() | float() as value):
            size = abs(math.log2(abs(value))) if value else 0.0, 0
        case ast.Name(id=name):
            size = (3.0, 0) if name in FORMULA_NAMES else (1.0, 1)
        case ast.UnaryOp(operand=operand):
            size = _bound_size(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            size = _bound_power(left, right)
        case ast.BinOp(left=left, op=operator, right=right):
            (bits, degree), (more_bits, more_degree) = _bound_size(left), _bound_size(right)
            if isinstance(operator, ast.Add | ast.Sub):
                # The denominators of fractions multiply.
                size = bits + more_bits + 1, max(degree, more_degree)
            else:
                size = bits + more_bits, degree + more_degree
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            bits, degree = _bound_size(argument)
            growth = 2.0 ** min(bits + 1, 64) if name in GROWING_FUNCTIONS else 64.0
            size = growth, degree
        case _:
            raise SyntaxError(type(node).__name__)
    if size[0] > MAX_BITS or size[1] > MAX_DEGREE:
        raise TooLarge("it would take numbers or powers too large to evaluate")
    return size


def _bound_power(base: ast.expr, exponent: ast.expr) -> tuple[float, int]:
    """Return the bounds of a power, from the largest value of the exponent."""
    (bits, degree), (exponent_bits, exponent_degree) = _bound_size(base), _bound_size(exponent)
    if exponent_degree:
        return bits + exponent_bits, degree + exponent_degree
    times = 2.0 ** min(exponent_bits, 64)
    return max(bits, 1.0) * times, math.ceil(degree * times - 1e-9)


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


# The scorers of these modules call eval() on the answer, to accept a Python list (reasoning-gym
# 0.1.25).
EVALUATING_MODULES = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
# These scorers pass the answer to sympy.parse_expr, which calls eval() too.
FORMULA_TASKS = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
# These scorers compare grids with ==; a grid in an entry has become lists in JSON.
TUPLE_TASKS = {"arc_agi", "rearc"}
# What the tasks below are kept from would pass through it.
UNGUARDED = {"composite": "name the tasks that it is made of"}
WRAPPERS = (("$$", "$$"), ("$", "$"), *((box + "{", "}") for box in BOXES))
MAX_DECORATIONS = 3
MAX_ANSWER_CHARS = 20_000


def grade(
    response: str,
    truth: object = None,
    *,
    task: str,
    entry: dict[str, Any],
    parameters: dict[str, Any] | None = None,
    exact: bool = True,
    thought_opened: bool = False,
    reading: Reading = "strict",
    reads_last_line: bool = False,
    **fields: object,
) -> Grade:
    """Return reasoning-gym's score of the response's final answer (see `reading.read_answer`).

    Args:
        response: the text that ends with the answer.
        truth: not used, the entry has it.
        task: a reasoning-gym dataset name.
        entry: the dataset's item (question, answer, metadata).
        parameters: the dataset's parameters, for scorers that read them.
        exact: 1 for a full score and 0 for anything less; otherwise the scorer's partial credit
            counts.
        thought_opened: the prompt ended with `<think>`.
        reading: where the answer is, as in `read_answer`.
        reads_last_line: whether a last line is read, as in `read_answer`.
        **fields: the prompt's other fields, which are not used.

    Raises:
        ValueError: an unknown task or an incomplete entry."""
    if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
        raise ValueError(f"the entry of a {task} prompt needs 'answer' and 'metadata'")
    scorer = _task_scorer(task, json.dumps(parameters or {}, sort_keys=True))
    extraction = read_answer(
        response,
        reading,
        thought_opened=thought_opened,
        reads_last_line=reads_last_line,
        numeric=is_number(entry["answer"]),
    )
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    answer = _strip_decoration(extraction.text, entry["answer"])
    if len(answer) > MAX_ANSWER_CHARS:
        return Grade(0.0, f"answer too long: {len(answer)} characters")
    if task in FORMULA_TASKS and (reason := scorer_refusal_reason(answer)):
        return Grade(0.0, f"refused: {shorten(answer)}: {reason}")
    guard = GUARDS.get(task)
    if guard is not None and (reason := guard(answer, entry)):
        return Grade(0.0, f"refused: {shorten(answer)}: {reason}")
    scored_entry = _as_tuples(entry) if task in TUPLE_TASKS else entry
    try:
        score = min(max(float(scorer(answer, scored_entry)), 0.0), 1.0)
    except Exception as error:
        if _cannot_score(scorer, scored_entry):
            raise
        return Grade(0.0, f"the scorer cannot read {shorten(answer)}: {type(error).__name__}")
    if exact or score in (0.0, 1.0):
        expected = "another" if entry["answer"] is None else entry["answer"]
        is_correct = score == 1.0
        return Grade(
            float(is_correct), describe_comparison(answer, expected, is_correct, extraction.source)
        )
    return Grade(score, f"partly right ({score:.2f}): {shorten(answer)}")


def _cannot_score(scorer: Callable[[str, Any], float], entry: Any) -> bool:
    """Whether the scorer raises on the entry's own answer too, so that the entry is at fault."""
    if entry["answer"] is None:
        return False
    try:
        scorer(str(entry["answer"]), entry)
    except Exception:  # noqa: BLE001 - a scorer may raise anything for what it cannot read
        return True
    return False


def _strip_decoration(answer: str, expected: object) -> str:
    """Return `answer` without the box and dollar signs around it, unless the truth has them."""
    for _ in range(MAX_DECORATIONS):
        for left, right in WRAPPERS:
            if delimiters_enclose(left, right, answer) and not str(expected).startswith(left):
                answer = answer[len(left) : len(answer) - len(right)].strip()
                break
    return answer


@functools.lru_cache(maxsize=256)
def _task_scorer(task: str, parameters: str) -> Callable[[str, Any], float]:
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}")
    if task in UNGUARDED:
        raise ValueError(f"the logic reward does not grade the task {task!r}: {UNGUARDED[task]}")
    for name in EVALUATING_MODULES:
        # Shadows the builtin in that module only: lists still count, calls no longer run.
        vars(importlib.import_module(name))["eval"] = ast.literal_eval
    return reasoning_gym.create_dataset(task, **json.loads(parameters)).score_answer


def _as_tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_as_tuples(item) for item in value)
    return value
