"""Accuracy of programs: the response's program is run on tests, each in a sandbox of its own.

Expected values never enter the program's sandbox: it gets one test's input, and its output is
compared outside. A checker is a program too and runs in another sandbox, after the first has ended.
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
from megatron_r1.rewards.sandbox.limits import Budget, Limits
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
    """Return 1 when the response's program (`find_program`) passes every test of `truth`, else 0.

    truth: see `problem.parse_problem`. language: "python", or "cpp" of the given `standard`.
    partial: run all tests and return the share passed; otherwise the first failure ends the run.
    limits: overrides of `sandbox.limits.Limits`. Raises ValueError for an invalid truth, limit or
    standard and for a broken checker, and SandboxUnavailable, with the remedy, where no sandbox can
    run; both for every response, the empty one included.
    """
    problem = parse_problem(truth, language)
    parsed_limits = Limits.parse(limits)
    if standard not in STANDARDS:
        raise ValueError(f"standard must be one of {', '.join(STANDARDS)}, got {standard!r}")
    availability.require(language)
    extraction = find_program(response, opened=opened)
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    deadline = time.monotonic() + parsed_limits.total_seconds
    if language == "cpp":
        program = compile_cpp(extraction.text, standard, parsed_limits.compiler())
        if isinstance(program, str):
            return Grade(0.0, f"does not compile: {program}")
    elif problem.function is not None:
        program = python_call(extraction.text, problem.function)
    else:
        program = python_script(extraction.text)
    with contextlib.closing(program):
        return _total(problem, partial, _run_tests(problem, program, parsed_limits, deadline))


def _total(problem: Problem, partial: bool, scores: Iterator[TestScore]) -> Grade:
    num_tests, num_passed, total, failure = len(problem.tests), 0, 0.0, ""
    for number, test in enumerate(scores, 1):
        num_passed += test.score == 1.0
        total += test.score
        if test.score < 1.0:
            failure = failure or f"test {number} of {num_tests}: {test.reason}"
            if not partial:
                return Grade(0.0, failure)
    if not failure:
        return Grade(1.0, f"passed {num_tests} of {num_tests} tests")
    return Grade(total / num_tests, f"passed {num_passed} of {num_tests} tests; {failure}")


def _run_tests(
    problem: Problem, program: Program, limits: Limits, deadline: float
) -> Iterator[TestScore]:
    def budget() -> Budget:
        left = max(deadline - time.monotonic(), 0.01)
        return limits.program(left, compiled=program.compiled)

    for test in problem.tests:
        if time.monotonic() >= deadline:
            yield TestScore(0.0, f"not run: the {limits.total_seconds:g} s of all tests are over")
        else:
            yield _run_test(problem, test, program, limits, budget)


def _run_test(
    problem: Problem, test: Test, program: Program, limits: Limits, budget: Callable[[], Budget]
) -> TestScore:
    if problem.function is None:
        stdin_bytes = test.stdin.encode("utf-8", "replace")
    else:
        stdin_bytes = marshal.dumps((test.args, test.kwargs), 2)
    test_budget = budget()
    with SealedFile(stdin_bytes) as stdin:
        outcome = run(program.command, test_budget, stdin=stdin, files=program.files)
    if failure := describe_failure(outcome, test_budget):
        return TestScore(0.0, failure)
    if problem.checker is not None:
        return run_checker(problem.checker, test, outcome.stdout, budget(), limits.program())
    compare = equal_output if problem.function is None else equal_result
    if compare(outcome.stdout, test.expected, problem.tolerance):
        return TestScore(1.0, "passed")
    printed = shorten(outcome.stdout[:400].decode("utf-8", "replace")) or "nothing"
    return TestScore(0.0, f"wrong answer: {printed}, expected {shorten(test.expected)}")
