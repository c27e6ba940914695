"""Accuracy on procedurally generated tasks, by reasoning-gym's own scorer of each task."""

import ast
import functools
import importlib
import json
import math
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.rewards.answer import BOXES, describe, encloses, extract
from megatron_r1.rewards.base import Grade, shorten

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
DECORATION = (("$$", "$$"), ("$", "$"), *((box + "{", "}") for box in BOXES))
MAX_DECORATIONS = 3
MAX_ANSWER_CHARS = 20_000
FORMULA_CHARS = re.compile(r"[0-9A-Za-z+\-*/^().,\s]*")
FORMULA_NAMES = frozenset(
    ("Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp")
    + ("ln", "log", "pi", "sec", "sin", "sinh", "sqrt", "tan", "tanh")
)
GROWING = frozenset(("exp", "sinh", "cosh"))
MAX_FORMULA_CHARS = 2_000
MAX_BITS = 4_096
"""Of any intermediate number: 1,200 digits."""
MAX_DEGREE = 64
"""Total degree in all symbols, which a scorer may expand."""


class TooLarge(ValueError):
    """Evaluating the formula could take too long."""


def grade(
    response: str,
    truth: object = None,
    *,
    task: str,
    entry: dict,
    parameters: dict | None = None,
    exact: bool = True,
    opened: bool = False,
    plain_line: bool = False,
    **other: object,
) -> Grade:
    """Return reasoning-gym's score of the response's final answer (see `answer.extract`).

    task: a reasoning-gym dataset name. entry: the dataset's item (question, answer, metadata).
    parameters: the dataset's parameters, for scorers that read them. exact: 1 for a full score and
    0 for anything less; otherwise the scorer's partial credit counts. truth: not used, the entry
    has it. Raises ValueError for an unknown task or an incomplete entry.
    """
    if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
        raise ValueError(f"the entry of a {task} prompt needs 'answer' and 'metadata'")
    scorer = _scorer(task, json.dumps(parameters or {}, sort_keys=True))
    extraction = extract(response, opened=opened, plain_line=plain_line)
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    answer = _undecorated(extraction.text, entry["answer"])
    if len(answer) > MAX_ANSWER_CHARS:
        return Grade(0.0, f"answer too long: {len(answer)} characters")
    if task in FORMULA_TASKS and (reason := refusal(answer)):
        return Grade(0.0, f"refused: {shorten(answer)}: {reason}")
    scored_entry = _as_tuples(entry) if task in TUPLE_TASKS else entry
    score = min(max(float(scorer(answer, scored_entry)), 0.0), 1.0)
    if exact or score in (0.0, 1.0):
        expected = "another" if entry["answer"] is None else entry["answer"]
        return Grade(float(score == 1.0), describe(answer, expected, score == 1.0))
    return Grade(score, f"partly right ({score:.2f}): {shorten(answer)}")


def _undecorated(answer: str, expected: object) -> str:
    """Return `answer` without the box and dollar signs around it, unless the truth has them."""
    for _ in range(MAX_DECORATIONS):
        for left, right in DECORATION:
            if encloses(left, right, answer) and not str(expected).startswith(left):
                answer = answer[len(left) : len(answer) - len(right)].strip()
                break
    return answer


@functools.lru_cache(maxsize=256)
def _scorer(task: str, parameters: str) -> Callable[[str, Any], float]:
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}")
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


def is_formula(answer: str) -> bool:
    """Whether `answer` holds only numbers, operators, one-letter symbols and common functions."""
    plain = unicodedata.normalize("NFKC", answer)
    if not FORMULA_CHARS.fullmatch(plain) or re.search(r"\.\s*[A-Za-z]", plain):
        return False
    names = re.findall(r"[A-Za-z][A-Za-z0-9]*", plain)
    return all(len(name) == 1 or name in FORMULA_NAMES for name in names)


def refusal(answer: str) -> str:
    """Return why a scorer must not evaluate `answer`, or "". Evaluates nothing itself."""
    if len(answer) > MAX_FORMULA_CHARS:
        return f"{len(answer)} characters, at most {MAX_FORMULA_CHARS} are evaluated"
    if not is_formula(answer):
        return "no plain formula"
    plain = " ".join(unicodedata.normalize("NFKC", answer).replace("^", "**").split())
    try:
        _size(ast.parse(plain, mode="eval").body)
    except TooLarge as error:
        return str(error)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "no formula that can be parsed"
    return ""


def _size(node: ast.expr) -> tuple[float, int]:
    """Return upper bounds of the bits of a value (or of its inverse) and of its degree."""
    match node:
        case ast.Constant(value=int() | float() as value):
            size = abs(math.log2(abs(value))) if value else 0.0, 0
        case ast.Name(id=name):
            size = (3.0, 0) if name in FORMULA_NAMES else (1.0, 1)
        case ast.UnaryOp(operand=operand):
            size = _size(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            size = _power(left, right)
        case ast.BinOp(left=left, op=operator, right=right):
            (bits, degree), (more_bits, more_degree) = _size(left), _size(right)
            if isinstance(operator, ast.Add | ast.Sub):
                # The denominators of fractions multiply.
                size = bits + more_bits + 1, max(degree, more_degree)
            else:
                size = bits + more_bits, degree + more_degree
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            bits, degree = _size(argument)
            growth = 2.0 ** min(bits + 1, 64) if name in GROWING else 64.0
            size = growth, degree
        case _:
            raise SyntaxError(type(node).__name__)
    if size[0] > MAX_BITS or size[1] > MAX_DEGREE:
        raise TooLarge("it would take numbers or powers too large to evaluate")
    return size


def _power(base: ast.expr, exponent: ast.expr) -> tuple[float, int]:
    """Return the bounds of a power, from the largest value of the exponent."""
    (bits, degree), (exponent_bits, exponent_degree) = _size(base), _size(exponent)
    if exponent_degree:
        return bits + exponent_bits, degree + exponent_degree
    times = 2.0 ** min(exponent_bits, 64)
    return max(bits, 1.0) * times, math.ceil(degree * times - 1e-9)
