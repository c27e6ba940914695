"""Accuracy on procedurally generated tasks, by reasoning-gym's own scorer of each task."""

import ast
import functools
import importlib
import json
from collections.abc import Callable
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.rewards.answer import BOXES, describe, encloses
from megatron_r1.rewards.base import Grade, shorten
from megatron_r1.rewards.logic.formula import refusal
from megatron_r1.rewards.logic.guards import GUARDS
from megatron_r1.rewards.reading import is_number, read_answer

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
DECORATION = (("$$", "$$"), ("$", "$"), *((box + "{", "}") for box in BOXES))
MAX_DECORATIONS = 3
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
    reading: str = "strict",
    plain_line: bool = False,
    **other: object,
) -> Grade:
    """Return reasoning-gym's score of the response's final answer (see `reading.read_answer`).

    task: a reasoning-gym dataset name.
    entry: the dataset's item (question, answer, metadata).
    parameters: the dataset's parameters, for scorers that read them.
    exact: 1 for a full score and 0 for anything less; otherwise the scorer's partial credit counts.
    truth: not used, the entry has it.
    Raises ValueError for an unknown task or an incomplete entry."""
    if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
        raise ValueError(f"the entry of a {task} prompt needs 'answer' and 'metadata'")
    scorer = _scorer(task, json.dumps(parameters or {}, sort_keys=True))
    extraction = read_answer(
        response, reading, opened=opened, plain_line=plain_line, numeric=is_number(entry["answer"])
    )
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    answer = _undecorated(extraction.text, entry["answer"])
    if len(answer) > MAX_ANSWER_CHARS:
        return Grade(0.0, f"answer too long: {len(answer)} characters")
    if task in FORMULA_TASKS and (reason := refusal(answer)):
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
        correct = score == 1.0
        return Grade(float(correct), describe(answer, expected, correct, extraction.source))
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
