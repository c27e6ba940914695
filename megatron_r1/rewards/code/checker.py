"""Special checkers: a Python program that decides whether an output answers a problem.

It gets three files as arguments, `input`, `expected` and `actual`, and runs in a sandbox of its
own, after the judged program has ended. Exit status 0 accepts and any other rejects, as with
testlib; a checker that exits with 0 may say more in its last line, as JSON: true or false, a score
between 0 and 1, or {"score": …, "reason": …}.

A checker *fails* when it raises, exits with 3, runs into a limit or says something that is no
verdict. Whose fault that is must not be for the answer to choose: an answer that is no number may
make `int` raise, and is wrong. So it is the checker's only where the expected output makes it fail
too, or where, without one, it fails before it looks at any.
"""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.code.problem import Test
from megatron_r1.rewards.code.scoring import TestScore, describe_failure
from megatron_r1.rewards.sandbox.process import Budget, Outcome
from megatron_r1.rewards.sandbox.programs import python_checker
from megatron_r1.rewards.sandbox.run import run
from megatron_r1.rewards.sandbox.sealed_file import SealedFile

FAILED = 3
HAS_OPENED_ACTUAL = b"\0actual\n"  # see sandbox.inside_checker


@dataclass(frozen=True)
class _Failure:
    """reason: what ended the checker. has_looked: whether it had opened the program's output."""

    reason: str
    has_looked: bool


def run_checker(
    checker: str, test: Test, actual: bytes, budget: Budget, full_budget: Budget
) -> TestScore:
    """The checker's verdict on `actual`.

    full_budget: of the run that finds out whose a failure is, which must not suffer from what the
    answer's program has used up. Raises ValueError for a checker that is broken whatever the
    answer.
    """
    judged = _run(checker, test, actual, budget)
    if isinstance(judged, TestScore):
        return judged
    control = _run(checker, test, test.expected.encode("utf-8", "replace"), full_budget)
    if isinstance(control, _Failure) and (test.expected or not control.has_looked):
        where = "on the expected output" if control.has_looked else "before it opens any output"
        raise ValueError(f"the checker is broken: it fails {where}: {control.reason}")
    return TestScore(0.0, f"the checker fails on this output: {judged.reason}")


def _run(checker: str, test: Test, actual: bytes, budget: Budget) -> TestScore | _Failure:
    program = python_checker(checker, "input", "expected", "actual")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(program))
        nothing = stack.enter_context(SealedFile(b""))
        files = {
            "input": SealedFile(test.stdin.encode("utf-8", "replace")),
            "expected": SealedFile(test.expected.encode("utf-8", "replace")),
            "actual": SealedFile(actual),
        }
        for file in files.values():
            stack.enter_context(file)
        outcome = run(program.command, budget, stdin=nothing, files={**program.files, **files})
    return _read(outcome, budget)


def _read(outcome: Outcome, budget: Budget) -> TestScore | _Failure:
    printed = outcome.stdout.decode("utf-8", "replace").strip().rpartition("\n")[2]
    has_looked = HAS_OPENED_ACTUAL in outcome.stderr
    if failure := describe_failure(outcome, budget):
        if outcome.stopped or outcome.status == FAILED or outcome.status > 128:
            return _Failure(failure, has_looked)
        return TestScore(0.0, f"the checker rejects: {shorten(printed) or failure}")
    if not printed:
        return TestScore(1.0, "accepted by the checker")
    score, reason = _parse(printed), ""
    if isinstance(score, dict):
        score, reason = score.get("score"), str(score.get("reason", ""))
    if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
        return _Failure(
            "its last line must be true, false, a score between 0 and 1 or "
            f'{{"score": …, "reason": …}}, got {shorten(printed)!r}',
            has_looked,
        )
    words = "accepted by" if score == 1 else "rejected by" if score == 0 else "partly accepted by"
    return TestScore(float(score), f"{words} the checker" + (f": {reason}" if reason else ""))


def _parse(printed: str) -> Any:
    try:
        return json.loads(printed)
    except (ValueError, RecursionError):
        return None
