"""Accuracy on procedurally generated tasks, by reasoning-gym's own scorer of each task."""

import ast
import functools
import importlib
import json
import re
import unicodedata
from collections.abc import Callable

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.rewards.answer import describe, extract
from megatron_r1.rewards.base import Grade, shorten

# These scorers call eval() on the answer, to forgive one that is a Python list.
EVALUATING_MODULES = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
# These give the answer to sympy.parse_expr, which is eval() too.
FORMULA_TASKS = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
FORMULA_CHARS = re.compile(r"[0-9A-Za-z+\-*/^().,\s]*")
FORMULA_NAMES = frozenset(
    ("Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp")
    + ("ln", "log", "pi", "sec", "sin", "sinh", "sqrt", "tan", "tanh")
)
# These compare grids with ==, and a grid that travelled as JSON comes back as lists.
TUPLE_TASKS = {"arc_agi", "rearc"}
MAX_ANSWER_CHARS = 20_000


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
    """The score reasoning-gym gives the response's final answer (see `answer.extract`).

    task: a reasoning-gym dataset name. entry: the dataset's item (question, answer, metadata).
    parameters: what the dataset was made with, for scorers that look at their own settings.
    exact: 1 for a full score and 0 for anything less; otherwise the scorer's partial credit counts.
    truth: not used, the entry has it. Raises ValueError for an unknown task or an incomplete entry.
    """
    if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
        raise ValueError(f"the entry of a {task} prompt needs 'answer' and 'metadata'")
    scorer = _scorer(task, json.dumps(parameters or {}, sort_keys=True))
    extraction = extract(response, opened=opened, plain_line=plain_line)
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    answer = extraction.text
    if len(answer) > MAX_ANSWER_CHARS:
        return Grade(0.0, f"answer too long: {len(answer)} characters")
    if task in FORMULA_TASKS and not is_formula(answer):
        return Grade(0.0, f"refused: {shorten(answer)} is not a plain formula")
    if task in TUPLE_TASKS:
        entry = _as_tuples(entry)
    score = min(max(float(scorer(answer, entry)), 0.0), 1.0)
    if exact or score in (0.0, 1.0):
        expected = "another" if entry["answer"] is None else entry["answer"]
        return Grade(float(score == 1.0), describe(answer, expected, score == 1.0))
    return Grade(score, f"partly right ({score:.2f}): {shorten(answer)}")


def is_formula(answer: str) -> bool:
    """Whether `answer` holds only numbers, operators, one-letter symbols and common functions."""
    plain = unicodedata.normalize("NFKC", answer)
    if not FORMULA_CHARS.fullmatch(plain) or re.search(r"\.\s*[A-Za-z]", plain):
        return False
    names = re.findall(r"[A-Za-z][A-Za-z0-9]*", plain)
    return all(len(name) == 1 or name in FORMULA_NAMES for name in names)


@functools.lru_cache(maxsize=256)
def _scorer(task: str, parameters: str) -> Callable[[str, dict], float]:
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}")
    for name in EVALUATING_MODULES:
        # Shadows the builtin in that module alone: lists still count, calls no longer run.
        importlib.import_module(name).eval = ast.literal_eval
    return reasoning_gym.create_dataset(task, **json.loads(parameters)).score_answer


def _as_tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_as_tuples(item) for item in value)
    return value
