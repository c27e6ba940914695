"""Scores an output by a problem's checker, a program of its own.

It runs in another sandbox after the response's program has ended."""

import json
from dataclasses import dataclass

from r1_grading.base.errors import shorten
from r1_grading.code.problem import Test
from r1_grading.rewards import Grade
from r1_grading.sandbox.limits import Budget
from r1_grading.sandbox.programs import python_script
from r1_grading.sandbox.run import ProgramOutcome, describe_failure, run_command

FAILED = 3
ACTUAL_OPENED = b"\0actual\n"  # see sandbox/inside_program.py


@dataclass(frozen=True)
class _Failure:
    """Why a checker gave no verdict.

    Attributes:
        reason: what ended the checker.
        opened_actual: whether it had opened the program's output."""

    reason: str
    opened_actual: bool


def run_checker(
    checker: str, test: Test, actual: bytes, budget: Budget, full_budget: Budget
) -> Grade:
    """Return the checker's score of `actual`.

    A checker is a Python program that gets three files as arguments, `input`, `expected` and
    `actual`, and runs after the response's program has ended. Exit status 0 accepts and any other
    rejects, as with testlib. A checker that exits with 0 may print a last line of JSON: true or
    false, a score between 0 and 1, or {"score": …, "reason": …}.

    A checker *fails* when it raises, exits with 3, exceeds a limit or prints an invalid last line.
    A response must not be able to blame the checker for that: an output that is no number may make
    `int` raise, and is wrong. So the checker counts as broken only where it also fails on the
    expected output or, without one, before it opens any output.

    Args:
        checker: the checker's source.
        test: the test, whose `stdin` and `expected` the checker reads.
        actual: what the response's program printed.
        budget: the limits of the run on `actual`.
        full_budget: the limits of the run on the expected output, which must not suffer from the
            time that the response's program has used.

    Returns:
        The score as a grade with its reason; 0 for an output on which only the checker's run on it
        fails.

    Raises:
        ValueError: a checker that is broken for every response."""
    score = _score_output(checker, test, actual, budget)
    if isinstance(score, Grade):
        return score
    control = _score_output(checker, test, test.expected.encode("utf-8", "replace"), full_budget)
    if isinstance(control, _Failure) and (test.expected or not control.opened_actual):
        stage = "on the expected output" if control.opened_actual else "before it opens any output"
        raise ValueError(f"the checker is broken: it fails {stage}: {control.reason}")
    return Grade(0.0, f"the checker fails on this output: {score.reason}")


def _score_output(checker: str, test: Test, actual: bytes, budget: Budget) -> Grade | _Failure:
    files = {
        "input": test.stdin.encode("utf-8", "replace"),
        "expected": test.expected.encode("utf-8", "replace"),
        "actual": actual,
    }
    program = python_script(checker, *files)
    outcome = run_command(program.command, budget, files={**program.files, **files})
    return _read_score(outcome, budget)


def _read_score(outcome: ProgramOutcome, budget: Budget) -> Grade | _Failure:
    last_line = outcome.stdout.decode("utf-8", "replace").strip().rpartition("\n")[2]
    opened_actual = ACTUAL_OPENED in outcome.stderr
    if failure := describe_failure(outcome, budget):
        if outcome.stopped or outcome.status == FAILED or outcome.status > 128:
            return _Failure(failure, opened_actual)
        return Grade(0.0, f"the checker rejects: {shorten(last_line) or failure}")
    if not last_line:
        return Grade(1.0, "accepted by the checker")
    try:
        score, reason = json.loads(last_line), ""
    except (ValueError, RecursionError):
        score, reason = None, ""
    if isinstance(score, dict):
        reason = str(score.get("reason", ""))
        score = score.get("score")
    if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
        return _Failure(
            "its last line must be true, false, a score between 0 and 1 or "
            f'{{"score": …, "reason": …}}, got {shorten(last_line)!r}',
            opened_actual,
        )
    verb = "accepted" if score == 1 else "rejected" if score == 0 else "partly accepted"
    return Grade(float(score), f"{verb} by the checker" + (f": {reason}" if reason else ""))
