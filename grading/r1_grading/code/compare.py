"""Decide whether a program's output is right: by comparison, or by a problem's checker.

A checker is a Python program that decides whether an output solves a problem. It gets three files
as arguments, `input`, `expected` and `actual`, and runs in a sandbox of its own, after the
response's program has ended. Exit status 0 accepts and any other rejects, as with testlib. A
checker that exits with 0 may print a last line of JSON: true or false, a score between 0 and 1, or
{"score": …, "reason": …}.

A checker *fails* when it raises, exits with 3, exceeds a limit or prints an invalid last line. A
response must not be able to blame the checker for that: an output that is no number may make `int`
raise, and is wrong. So the checker counts as broken only where it also fails on the expected output
or, without one, before it opens any output."""

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from r1_grading.base.errors import shorten
from r1_grading.base.values import load_json
from r1_grading.code.problem import Test
from r1_grading.rewards import Grade
from r1_grading.sandbox.limits import Budget
from r1_grading.sandbox.programs import python_script
from r1_grading.sandbox.run import ProgramOutcome, describe_failure, run

NUMBER = re.compile(rb"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
MAX_NUMBER_BYTES = 4_000
FLOAT = re.compile(rb"\.|[eE]-")
"""What a number has that is no integer: a point, or a negative exponent."""
FLOAT_TOLERANCE = 1e-6
"""The tolerance of floats where a problem has none: the usual one of statements that ask for an
absolute or relative error. The harnesses of APPS, TACO and verl's `prime_code` accept 1e-5 (numpy's
allclose), LiveCodeBench's demands equal values."""


def equal_output(
    actual: bytes, expected: str, tolerance: float | None, *, by_value: bool = False
) -> bool:
    """Whether all lines have the same tokens (split at white space), blank lines at the ends aside.

    tolerance: two tokens that are decimal numbers may differ by tolerance × max(1, |expected|), so
    that 0 accepts 1.0 for 1. None: `FLOAT_TOLERANCE` where the expected token is a float; others
    are compared as text, or with `by_value` as numbers."""
    texts = actual, expected.encode("utf-8", "replace")
    left, right = (text.strip().split(b"\n") for text in texts)
    return len(left) == len(right) and all(
        a == b
        or all(
            _equal_tokens(*pair, tolerance, by_value) for pair in zip_longest(a.split(), b.split())
        )
        for a, b in zip(left, right, strict=True)
    )


def equal_result(actual: bytes, expected: Any, tolerance: float | None) -> bool:
    """Whether `actual`, JSON text, is the JSON value `expected`, compared as Python compares.

    So 1 == 1.0 == True, and NaN equals nothing; a tuple is a list in JSON. tolerance: as in
    `equal_output`, for every number; None: `FLOAT_TOLERANCE` where a float is expected."""
    try:
        return _equal_values(load_json(actual), expected, tolerance)
    except (ValueError, RecursionError, OverflowError):
        return False


def _equal_tokens(
    actual: bytes | None, expected: bytes | None, tolerance: float | None, by_value: bool
) -> bool:
    if actual == expected or actual is None or expected is None:
        return actual == expected
    if tolerance is None:
        is_float = FLOAT.search(expected) is not None
        if not (is_float or by_value):
            return False
        tolerance = FLOAT_TOLERANCE if is_float else 0.0
    if max(len(actual), len(expected)) > MAX_NUMBER_BYTES:
        return False
    if not (NUMBER.fullmatch(actual) and NUMBER.fullmatch(expected)):
        return False
    # Exactly: as floats, 2**53 and 2**53 + 1 would be equal, and 1e999 infinite.
    value, wanted = Fraction(actual.decode()), Fraction(expected.decode())
    return abs(value - wanted) <= Fraction(str(tolerance)) * max(Fraction(1), abs(wanted))


def _equal_values(actual: Any, expected: Any, tolerance: float | None) -> bool:
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            return False
        return all(_equal_values(actual[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return False
        return all(_equal_values(a, b, tolerance) for a, b in zip(actual, expected, strict=True))
    if actual == expected:
        return True
    if not all(isinstance(v, int | float) for v in (actual, expected)):
        return False
    if tolerance is None:
        tolerance = FLOAT_TOLERANCE if isinstance(expected, float) else 0.0
    # Exactly, as above; NaN and infinity have no fraction, and are not near anything.
    margin = Fraction(str(tolerance)) * max(Fraction(1), abs(Fraction(expected)))
    return abs(Fraction(actual) - Fraction(expected)) <= margin


FAILED = 3
ACTUAL_OPENED = b"\0actual\n"  # see sandbox/inside_script.py


@dataclass(frozen=True)
class _Failure:
    """Why a checker gave no verdict. reason: what ended the checker. opened_actual: whether it had
    opened the program's output."""

    reason: str
    opened_actual: bool


def run_checker(
    checker: str, test: Test, actual: bytes, budget: Budget, full_budget: Budget
) -> Grade:
    """Return the checker's score of `actual`.

    full_budget: for the run on the expected output, which must not suffer from the time that the
    response's program has used. Raises ValueError for a checker that is broken for every response.
    """
    score = _run(checker, test, actual, budget)
    if isinstance(score, Grade):
        return score
    control = _run(checker, test, test.expected.encode("utf-8", "replace"), full_budget)
    if isinstance(control, _Failure) and (test.expected or not control.opened_actual):
        where = "on the expected output" if control.opened_actual else "before it opens any output"
        raise ValueError(f"the checker is broken: it fails {where}: {control.reason}")
    return Grade(0.0, f"the checker fails on this output: {score.reason}")


def _run(checker: str, test: Test, actual: bytes, budget: Budget) -> Grade | _Failure:
    files = {
        "input": test.stdin.encode("utf-8", "replace"),
        "expected": test.expected.encode("utf-8", "replace"),
        "actual": actual,
    }
    program = python_script(checker, *files)
    outcome = run(program.command, budget, files={**program.files, **files})
    return _read_score(outcome, budget)


def _read_score(outcome: ProgramOutcome, budget: Budget) -> Grade | _Failure:
    printed = outcome.stdout.decode("utf-8", "replace").strip().rpartition("\n")[2]
    opened_actual = ACTUAL_OPENED in outcome.stderr
    if failure := describe_failure(outcome, budget):
        if outcome.stopped or outcome.status == FAILED or outcome.status > 128:
            return _Failure(failure, opened_actual)
        return Grade(0.0, f"the checker rejects: {shorten(printed) or failure}")
    if not printed:
        return Grade(1.0, "accepted by the checker")
    try:
        score, reason = json.loads(printed), ""
    except (ValueError, RecursionError):
        score, reason = None, ""
    if isinstance(score, dict):
        reason = str(score.get("reason", ""))
        score = score.get("score")
    if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
        return _Failure(
            "its last line must be true, false, a score between 0 and 1 or "
            f'{{"score": …, "reason": …}}, got {shorten(printed)!r}',
            opened_actual,
        )
    verb = "accepted" if score == 1 else "rejected" if score == 0 else "partly accepted"
    return Grade(float(score), f"{verb} by the checker" + (f": {reason}" if reason else ""))
