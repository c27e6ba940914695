"""Accuracy of programs: the answer's program is run on tests, each in a sandbox of its own.

Expected values never enter the sandbox of the program: it gets one test's input, what comes back is
compared out here. A checker is a program too and gets a sandbox of its own, after the answer's has
ended.
"""

import contextlib
import marshal
import time
from collections.abc import Callable, Iterator

from megatron_r1.rewards.base import Grade, shorten
from megatron_r1.rewards.code.checker import run_checker
from megatron_r1.rewards.code.compare import equal_output, equal_result
from megatron_r1.rewards.code.find_program import find_program
from megatron_r1.rewards.code.problem import Problem, Test, parse_problem
from megatron_r1.rewards.code.scoring import TestScore, describe_failure
from megatron_r1.rewards.sandbox import availability
from megatron_r1.rewards.sandbox.limits import Limits
from megatron_r1.rewards.sandbox.process import Budget
from megatron_r1.rewards.sandbox.programs import (
    STANDARDS,
    Program,
    compile_cpp,
    python_call,
    python_script,
)
from megatron_r1.rewards.sandbox.run import run
from megatron_r1.rewards.sandbox.sealed_file import SealedFile


def grade(
    response: str,
    truth: object,
    *,
    language: str = "python",
    partial: bool = False,
    limits: dict | None = None,
    standard: str = "c++20",
    opened: bool = False,
    **entry: object,
) -> Grade:
    """1 when the program of the response (`answer`) passes every test of `truth`, else 0.

    truth: see `problem`. language: "python" or "cpp", then by `standard`. partial: the share of
    tests passed instead, all of which are then run; otherwise the first failure ends it. limits:
    what differs from sandbox.limits.Limits. Raises ValueError for a truth, limit or standard that
    is none and for a checker that is broken, and SandboxUnavailable, with the remedy, where nothing
    can be sandboxed: for any response, the empty one included.
    """
    problem = parse_problem(truth, language)
    bounds = Limits.parse(limits)
    if standard not in STANDARDS:
        raise ValueError(f"standard must be one of {', '.join(STANDARDS)}, got {standard!r}")
    availability.require(language)
    extraction = find_program(response, opened=opened)
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    deadline = time.monotonic() + bounds.total_seconds
    if language == "cpp":
        program = compile_cpp(extraction.text, standard, bounds.compiler())
        if isinstance(program, str):
            return Grade(0.0, f"does not compile: {program}")
    elif problem.function is not None:
        program = python_call(extraction.text, problem.function)
    else:
        program = python_script(extraction.text)
    with contextlib.closing(program):
        return _total(problem, partial, _verdicts(problem, program, bounds, deadline))


def _total(problem: Problem, partial: bool, verdicts: Iterator[TestScore]) -> Grade:
    num_tests, num_passed, score, failure = len(problem.tests), 0, 0.0, ""
    for number, verdict in enumerate(verdicts, 1):
        num_passed += verdict.score == 1.0
        score += verdict.score
        if verdict.score < 1.0:
            failure = failure or f"test {number} of {num_tests}: {verdict.reason}"
            if not partial:
                return Grade(0.0, failure)
    if not failure:
        return Grade(1.0, f"passed {num_tests} of {num_tests} tests")
    return Grade(score / num_tests, f"passed {num_passed} of {num_tests} tests; {failure}")


def _verdicts(
    problem: Problem, program: Program, limits: Limits, deadline: float
) -> Iterator[TestScore]:
    def budget() -> Budget:
        left = max(deadline - time.monotonic(), 0.01)
        return limits.program(left, compiled=program.compiled)

    for test in problem.tests:
        if time.monotonic() >= deadline:
            yield TestScore(0.0, f"not run: the {limits.total_seconds:g} s of all tests are over")
        else:
            yield _verdict(problem, test, program, limits, budget)


def _verdict(
    problem: Problem, test: Test, program: Program, limits: Limits, budget: Callable[[], Budget]
) -> TestScore:
    if problem.function is None:
        given = test.stdin.encode("utf-8", "replace")
    else:
        given = marshal.dumps((test.args, test.kwargs), 2)
    spent = budget()
    with SealedFile(given) as stdin:
        outcome = run(program.command, spent, stdin=stdin, files=program.files)
    if failure := describe_failure(outcome, spent):
        return TestScore(0.0, failure)
    if problem.checker is not None:
        return run_checker(problem.checker, test, outcome.stdout, budget(), limits.program())
    compare = equal_output if problem.function is None else equal_result
    if compare(outcome.stdout, test.expected, problem.tolerance):
        return TestScore(1.0, "passed")
    printed = shorten(outcome.stdout[:400].decode("utf-8", "replace")) or "nothing"
    return TestScore(0.0, f"wrong answer: {printed}, expected {shorten(test.expected)}")
