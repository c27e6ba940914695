"""Accuracy of programs: the response's program is run on tests, each in a sandbox of its own.

Expected values never enter the program's sandbox: it gets one test's input, and its output is
compared outside. A checker is a program too and runs in another sandbox, after the first has ended.
"""

import marshal
import time
from collections.abc import Iterator

from megatron_r1.rewards.base import Grade, shorten
from megatron_r1.rewards.code.checker import run_checker
from megatron_r1.rewards.code.compare import equal_output, equal_result
from megatron_r1.rewards.code.find_program import find_program
from megatron_r1.rewards.code.problem import Problem, parse_problem
from megatron_r1.rewards.sandbox import availability
from megatron_r1.rewards.sandbox.limits import Limits
from megatron_r1.rewards.sandbox.process import describe_failure
from megatron_r1.rewards.sandbox.programs import (
    STANDARDS,
    Program,
    compile_cpp,
    python_call,
    python_script,
)
from megatron_r1.rewards.sandbox.run import run


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
    num_tests, num_passed, total, failure = len(problem.tests), 0, 0.0, ""
    for number, test in enumerate(_run_tests(problem, program, parsed_limits, deadline), 1):
        num_passed += test.reward == 1.0
        total += test.reward
        if test.reward < 1.0:
            failure = failure or f"test {number} of {num_tests}: {test.reason}"
            if not partial:
                return Grade(0.0, failure)
    if not failure:
        return Grade(1.0, f"passed {num_tests} of {num_tests} tests")
    return Grade(total / num_tests, f"passed {num_passed} of {num_tests} tests; {failure}")


def _run_tests(problem: Problem, program: Program, limits: Limits, end: float) -> Iterator[Grade]:
    """Yield the grade of each test. end: time.monotonic() at which no further test starts."""
    is_call = problem.function is not None
    is_equal = equal_result if is_call else equal_output
    for test in problem.tests:
        if (left := end - time.monotonic()) <= 0:
            yield Grade(0.0, f"not run: the {limits.total_seconds:g} s of all tests are over")
            continue
        budget = limits.program(left, compiled=program.compiled)
        if is_call:
            stdin = marshal.dumps((test.args, test.kwargs), 2)
        else:
            stdin = test.stdin.encode("utf-8", "replace")
        outcome = run(program.command, budget, stdin=stdin, files=program.files)
        if failure := describe_failure(outcome, budget):
            yield Grade(0.0, failure)
        elif problem.checker is not None:
            budget = limits.program(end - time.monotonic())
            yield run_checker(problem.checker, test, outcome.stdout, budget, limits.program())
        elif is_equal(outcome.stdout, test.expected, problem.tolerance):
            yield Grade(1.0, "passed")
        else:
            printed = shorten(outcome.stdout[:400].decode("utf-8", "replace")) or "nothing"
            yield Grade(0.0, f"wrong answer: {printed}, expected {shorten(test.expected)}")
