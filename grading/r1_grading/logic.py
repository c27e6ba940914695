"""Accuracy on procedurally generated tasks, by reasoning-gym's own scorer of each task.

A scorer that evaluates its answer gets it only after `formula_bounds` has bounded what it computes.
`task_guards` refuses answers that a scorer pays although they are wrong."""

import ast
import functools
import importlib
import json
from collections.abc import Callable
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from r1_grading.base.errors import shorten
from r1_grading.formula_bounds import scorer_refusal_reason
from r1_grading.reading import Reading, is_number, read_answer
from r1_grading.reading.tags_and_boxes import BOXES, delimiters_enclose, describe_comparison
from r1_grading.rewards import Grade
from r1_grading.task_guards import GUARDS

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
