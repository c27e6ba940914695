"""Accuracy of programs: the response's program is run on tests, each in a sandbox of its own.

Expected values never enter the program's sandbox: it gets one test's input, and its output is
compared outside."""

import functools
import marshal
import time
from collections.abc import Iterator
from typing import Any

from r1_grading.base.errors import shorten
from r1_grading.code.checker import run_checker
from r1_grading.code.outputs import same_output, same_result
from r1_grading.code.problem import Problem, parse_problem
from r1_grading.code.program_text import find_program
from r1_grading.rewards import Grade
from r1_grading.sandbox.limits import MIB, Limits
from r1_grading.sandbox.programs import (
    STANDARDS,
    Program,
    compile_cpp,
    python_call,
    python_script,
    require_sandbox,
)
from r1_grading.sandbox.run import describe_failure, run_command


def grade(
    response: str,
    truth: object,
    *,
    language: str | None = None,
    partial: bool | None = False,
    limits: dict[str, Any] | None = None,
    standard: str | None = "c++20",
    thought_opened: bool = False,
    **entry: object,
) -> Grade:
    """Return 1 when the response's program (`find_program`) passes every test of `truth`, else 0.

    Args:
        response: the text with the program.
        truth: see `problem.parse_problem`.
        language: "python", or "cpp" of the given `standard`, as `problem.parse_language` reads it;
            None: the truth's own, else Python.
        partial: run all tests and return the share passed; otherwise the first failure ends the
            run.
        limits: overrides of `sandbox.limits.Limits`.
        standard: the C++ standard, one of `STANDARDS`.
        thought_opened: the prompt ended with `<think>`.
        **entry: the prompt's other fields, which are not used.

    Raises:
        ValueError: an invalid truth, limit or standard, or a broken checker; for every response,
            the empty one included.
        SandboxUnavailable: no sandbox can run, for every response; with the remedy."""
    problem = parse_problem(truth, language)
    language, standard = problem.language, standard or "c++20"
    parsed_limits = Limits.parse(limits)
    if standard not in STANDARDS:
        raise ValueError(f"standard must be one of {', '.join(STANDARDS)}, got {standard!r}")
    _check_output_limit(problem, parsed_limits)
    require_sandbox(language)
    extraction = find_program(response, thought_opened=thought_opened)
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
        program = python_script(extraction.text, names=problem.is_livecodebench)
    num_tests = len(problem.tests)
    num_passed = 0
    reward_sum = 0.0
    failure = ""
    for number, test in enumerate(_run_tests(problem, program, parsed_limits, deadline), 1):
        num_passed += test.reward == 1.0
        reward_sum += test.reward
        if test.reward < 1.0:
            failure = failure or f"test {number} of {num_tests}: {test.reason}"
            if not partial:
                return Grade(0.0, failure)
    if not failure:
        return Grade(1.0, f"passed {num_tests} of {num_tests} tests")
    return Grade(reward_sum / num_tests, f"passed {num_passed} of {num_tests} tests; {failure}")


def _check_output_limit(problem: Problem, limits: Limits) -> None:
    """Raise ValueError for an expected output that no program may print."""
    if problem.checker is not None:
        return
    for number, test in enumerate(problem.tests, 1):
        size = 1 + _size_in_bytes(test.expected)  # a program ends its last line
        if size > limits.output_mib * MIB:
            raise ValueError(
                f"the truth of a code prompt: test {number} expects {size / MIB:.1f} MiB, more "
                f"than limits.output_mib: {limits.output_mib:g}; raise that limit of the prompt"
            )


def _size_in_bytes(expected: object) -> int:
    """Return the size in bytes of an output or of a result.

    That of a result is an estimate from its numbers and texts."""
    if isinstance(expected, str):
        return len(expected.encode("utf-8", "replace"))
    if isinstance(expected, list | dict):
        parts = [*expected, *(expected.values() if isinstance(expected, dict) else ())]
        return 2 + sum(1 + _size_in_bytes(part) for part in parts)
    return expected.bit_length() // 4 if isinstance(expected, int) else 1


def _run_tests(problem: Problem, program: Program, limits: Limits, end: float) -> Iterator[Grade]:
    """Yield the grade of each test."""
    is_call = problem.function is not None
    is_equal = same_result
    if not is_call:
        is_equal = functools.partial(same_output, by_value=problem.is_livecodebench)
    for test in problem.tests:
        if (seconds := end - time.monotonic()) <= 0:
            yield Grade(0.0, f"not run: the {limits.total_seconds:g} s of all tests are over")
            continue
        budget = limits.program(seconds, compiled=program.compiled)
        if is_call:
            # Importing json takes 8 ms in the sandbox. The system's Python, which may run there
            # (`host.interpreter`), can be older than this one and read no later version.
            stdin = marshal.dumps((test.args, test.kwargs), 2)
        else:
            stdin = test.stdin.encode("utf-8", "replace")
        outcome = run_command(program.command, budget, stdin=stdin, files=program.files)
        if failure := describe_failure(outcome, budget):
            yield Grade(0.0, failure)
        elif problem.checker is not None:
            budget = limits.program(end - time.monotonic())
            yield run_checker(problem.checker, test, outcome.stdout, budget, limits.program())
        elif any(
            is_equal(outcome.stdout, expected, problem.tolerance)
            for expected in (test.expected, *test.alternatives)
        ):
            yield Grade(1.0, "passed")
        else:
            output_text = shorten(outcome.stdout[:400].decode("utf-8", "replace")) or "nothing"
            yield Grade(0.0, f"wrong answer: {output_text}, expected {shorten(test.expected)}")
