"""Accuracy of programs: the response's program is run on tests, each in a sandbox of its own.

Expected values never enter the program's sandbox: it gets one test's input, and its output is
compared outside. A checker is a program too and runs in another sandbox, after the first has ended.
`problem` reads the tests, and `asserts` those that are Python."""

import functools
import json
import marshal
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from r1_grading.base.errors import shorten
from r1_grading.base.values import load_json
from r1_grading.code.problem import Problem, Test, parse_problem
from r1_grading.reading.answer import (
    ANSWER,
    END_ANSWER,
    Extraction,
    after_thought,
    extract,
    without_special_tokens,
)
from r1_grading.rewards import Grade
from r1_grading.sandbox.limits import MIB, Budget, Limits
from r1_grading.sandbox.programs import (
    STANDARDS,
    Program,
    compile_cpp,
    python_call,
    python_script,
    require_sandbox,
)
from r1_grading.sandbox.run import ProgramOutcome, describe_failure, run

FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
NO_PROGRAM = ("text", "txt", "plaintext", "output", "console", "json", "md", "markdown")
"""Languages of fences around what a program reads or prints."""
PROMPTS, SYNTAX = (">>> ", "$ "), "(=:;{"
"""How lines of an interactive session begin, and the signs: a program has at least one of them."""
MAX_ANSWER_CHARS, MAX_PROGRAM_CHARS = 2**20, 2**18


def grade(
    response: str,
    truth: object,
    *,
    language: str | None = None,
    partial: bool | None = False,
    limits: dict | None = None,
    standard: str | None = "c++20",
    opened: bool = False,
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
        opened: the prompt ended with `<think>`.
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
        program = python_script(extraction.text, names=problem.is_livecodebench)
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


def _check_output_limit(problem: Problem, limits: Limits) -> None:
    """Raise ValueError for an expected output that no program may print."""
    if problem.checker is not None:
        return
    for number, test in enumerate(problem.tests, 1):
        size = 1 + _size(test.expected)  # a program ends its last line
        if size > limits.output_mib * MIB:
            raise ValueError(
                f"the truth of a code prompt: test {number} expects {size / MIB:.1f} MiB, more "
                f"than limits.output_mib: {limits.output_mib:g}; raise that limit of the prompt"
            )


def _size(expected: object) -> int:
    """Return the size in bytes of an output or of a result; of a result about, from its numbers and
    texts."""
    if isinstance(expected, str):
        return len(expected.encode("utf-8", "replace"))
    if isinstance(expected, list | dict):
        parts = [*expected, *(expected.values() if isinstance(expected, dict) else ())]
        return 2 + sum(1 + _size(part) for part in parts)
    return expected.bit_length() // 4 if isinstance(expected, int) else 1


def _run_tests(problem: Problem, program: Program, limits: Limits, end: float) -> Iterator[Grade]:
    """Yield the grade of each test.

    Args:
        problem: the tests.
        program: the compiled answer.
        limits: the limits of one answer.
        end: time.monotonic() at which no further test starts."""
    is_call = problem.function is not None
    is_equal = equal_result
    if not is_call:
        is_equal = functools.partial(equal_output, by_value=problem.is_livecodebench)
    for test in problem.tests:
        if (left := end - time.monotonic()) <= 0:
            yield Grade(0.0, f"not run: the {limits.total_seconds:g} s of all tests are over")
            continue
        budget = limits.program(left, compiled=program.compiled)
        if is_call:
            # Importing json takes 8 ms in the sandbox. The system's Python, which may run there
            # (`host.interpreter`), can be older than this one and read no later version.
            stdin = marshal.dumps((test.args, test.kwargs), 2)
        else:
            stdin = test.stdin.encode("utf-8", "replace")
        outcome = run(program.command, budget, stdin=stdin, files=program.files)
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
            printed = shorten(outcome.stdout[:400].decode("utf-8", "replace")) or "nothing"
            yield Grade(0.0, f"wrong answer: {printed}, expected {shorten(test.expected)}")


def find_program(response: str, *, opened: bool = False) -> Extraction:
    """Return the last fenced block after the thought, inside `<answer>` if there is one; blocks
    behind a program that only show its output or calls do not count.

    There is no program in a thought that is not closed, in two <answer> blocks, without a fence, or
    where the last fence is not closed. Which language a fence names does not matter otherwise, and
    its indentation is removed from its lines. Special tokens at the end of the response are
    ignored. Linear in the length of the response."""
    visible = after_thought(without_special_tokens(response), opened)
    if visible is None:
        return Extraction(None, "no program found: the thought is never closed")
    if ANSWER in visible or END_ANSWER in visible:
        extraction = extract(response, opened=opened)
        if extraction.text is None:
            return extraction
        visible = extraction.text
    if len(visible) > MAX_ANSWER_CHARS:
        return Extraction(None, f"the answer is too long: {len(visible)} characters")
    program, is_open = _last_block(visible)
    if is_open:
        return Extraction(None, "no program found: the last fenced block is not closed")
    if program is None or not program.strip():
        return Extraction(None, "no program found: no fenced block")
    if len(program) > MAX_PROGRAM_CHARS:
        return Extraction(None, f"the program is too long: {len(program)} characters")
    return Extraction(program)


def _is_output(tag: str, lines: list[str]) -> bool:
    """Return whether a block behind a program shows what it prints, or calls at a prompt.

    Args:
        tag: the fence's language.
        lines: the lines of the block."""
    if tag in NO_PROGRAM or next(filter(None, map(str.strip, lines)), "").startswith(PROMPTS):
        return True
    return not tag and not any(sign in line for line in lines for sign in SYNTAX)


def _last_block(text: str) -> tuple[str | None, bool]:
    """Return the last complete fenced block (CommonMark), and whether one is open at the end."""
    program: str | None = None
    lines: list[str] = []
    fence = indent = tag = ""
    for line in text.split("\n"):
        match = FENCE.fullmatch(line.rstrip("\r"))
        if not fence:
            if match and not ("`" in match[3] and match[2][0] == "`"):
                indent, fence, lines = match[1], match[2], []
                tag = match[3].strip().lower()
        elif match and match[2].startswith(fence) and not match[3].strip():
            if program is None or not _is_output(tag, lines):
                program = "\n".join(lines) + "\n"
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
    return program, bool(fence)


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

    Args:
        actual: what the program printed.
        expected: the test's output.
        tolerance: two tokens that are decimal numbers may differ by tolerance × max(1, |expected|),
            so that 0 accepts 1.0 for 1. None: `FLOAT_TOLERANCE` where the expected token is a
            float; others are compared as text, or with `by_value` as numbers.
        by_value: whether, without a tolerance, other decimal numbers are compared as numbers."""
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

    So 1 == 1.0 == True, and NaN equals nothing; a tuple is a list in JSON.

    Args:
        actual: the function's result as JSON text.
        expected: the test's result.
        tolerance: as in `equal_output`, for every number; None: `FLOAT_TOLERANCE` where a float is
            expected."""
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
    score = _score(checker, test, actual, budget)
    if isinstance(score, Grade):
        return score
    control = _score(checker, test, test.expected.encode("utf-8", "replace"), full_budget)
    if isinstance(control, _Failure) and (test.expected or not control.opened_actual):
        where = "on the expected output" if control.opened_actual else "before it opens any output"
        raise ValueError(f"the checker is broken: it fails {where}: {control.reason}")
    return Grade(0.0, f"the checker fails on this output: {score.reason}")


def _score(checker: str, test: Test, actual: bytes, budget: Budget) -> Grade | _Failure:
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
