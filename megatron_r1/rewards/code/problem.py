"""Parse and validate the truth of a code prompt: its tests and how they are judged."""

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_r1.errors import did_you_mean

MAX_DIGITS = 100_000
LANGUAGES = ("python", "cpp")
WHAT = "the truth of a code prompt"
KEYS = ("tests", "function", "checker", "tolerance")
LIVECODEBENCH_KEYS = {"input", "output"}
# LiveCodeBench's rows have a "testtype"; here the key "function" decides, and it is ignored.
PROGRAM_KEYS = ("stdin", "stdout", "input", "output", "testtype")
CALL_KEYS = ("args", "kwargs", "result", "input", "output", "testtype")


@dataclass(frozen=True)
class Test:
    """One test: stdin and expected (text) of a program, or args, kwargs and expected (JSON values)
    of a function call."""

    expected: Any
    stdin: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Problem:
    """A programming problem, as its tests define it.

    tests: at least one.
    function: the name to call, or None where the program reads and prints.
    checker: source of a Python program that replaces the comparison, or None.
    tolerance: allowed difference of numbers, or None for that of floats only (see `compare`).
    is_livecodebench: the tests have LiveCodeBench's form. Integers are compared by value, and a
        script has the names that its harness imports, as a function always has."""

    tests: tuple[Test, ...]
    function: str | None = None
    checker: str | None = None
    tolerance: float | None = None
    is_livecodebench: bool = False


def parse_problem(truth: object, language: str) -> Problem:
    """Parse `truth`, an object or its JSON text. Raises ValueError naming the faulty test."""
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    if isinstance(truth, str):
        truth = _json(truth, WHAT)
    if not isinstance(truth, dict):
        raise ValueError(f'{WHAT} must be {{"tests": […]}}, got {type(truth).__name__}')
    _check_keys(truth, WHAT, KEYS)
    tests, function = truth.get("tests"), _text_or_none(truth, "function")
    checker, tolerance = _text_or_none(truth, "checker"), truth.get("tolerance")
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"{WHAT} needs a list of at least one test, got {tests!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float | None):
        raise ValueError(f"{WHAT}: tolerance must be a number, got {tolerance!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"{WHAT}: tolerance must be at least 0 and below 1, got {tolerance!r}")
    if function is not None and (language != "python" or checker is not None):
        raise ValueError(f"{WHAT}: function-call tests are for python, and without a checker")
    if checker is not None and tolerance is not None:
        raise ValueError(f"{WHAT} has a checker, which decides alone: leave out the tolerance")
    parse = _call_test if function is not None else _program_test
    is_livecodebench = all(isinstance(t, dict) and t.keys() >= LIVECODEBENCH_KEYS for t in tests)
    return Problem(
        tuple(parse(test, f"{WHAT}: test {i}", checker) for i, test in enumerate(tests, 1)),
        function,
        checker,
        tolerance,
        is_livecodebench,
    )


def _program_test(test: object, what: str, checker: str | None) -> Test:
    """Parse {"stdin", "stdout"}, or LiveCodeBench's {"input", "output"}; with a checker, the
    expected output may be missing."""
    test = _known(test, what, PROGRAM_KEYS)
    stdin = test.get("stdin", test.get("input", ""))
    stdout = test.get("stdout", test.get("output", "" if checker else None))
    for name, value in (("stdin", stdin), ("stdout", stdout)):
        if not isinstance(value, str):
            raise ValueError(f"{what}: {name} must be text, got {value!r}")
    return Test(expected=stdout, stdin=stdin)


def _call_test(test: object, what: str, checker: str | None) -> Test:
    """Parse {"args", "kwargs", "result"}, or LiveCodeBench's {"input", "output"}, whose input has
    one JSON argument per line."""
    test = _known(test, what, CALL_KEYS)
    if "result" in test:
        args, kwargs, expected = test.get("args", []), test.get("kwargs", {}), test["result"]
    elif isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
        # Not splitlines(), which also splits at U+2028 and U+0085: JSON texts may contain these.
        lines = [line for line in test["input"].split("\n") if line.strip()]
        args, kwargs = [_json(line, f"{what}: an argument") for line in lines], {}
        expected = _json(test["output"], f"{what}: output")
    else:
        raise ValueError(f"{what} needs 'args' and 'result', or 'input' and 'output' as JSON text")
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f"{what}: args must be a list and kwargs an object")
    return Test(expected=expected, args=tuple(args), kwargs=kwargs)


def _known(test: object, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return `test` if all its keys are known: a misspelt "stdin" would be an empty input, which
    no correct program passes."""
    if not isinstance(test, dict):
        raise ValueError(f"{what} must be an object, got {type(test).__name__}")
    _check_keys(test, what, keys)
    return test


def _check_keys(value: dict[str, Any], what: str, known: tuple[str, ...]) -> None:
    if unknown := sorted(value.keys() - set(known)):
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"{what} has {unknown[0]!r}{hint} (known: {', '.join(known)})")


def _text_or_none(truth: dict, key: str) -> str | None:
    value = truth.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{WHAT}: {key} must be text, got {value!r}")
    return value


def load_json(text: str | bytes) -> Any:
    """Return a JSON value, with integers of up to 100,000 digits: int() refuses more than 4,300,
    because it takes quadratic time."""
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits) if len(digits) <= 4_000 else int(Decimal(digits))


def _json(text: str, what: str) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}): {text[:80]!r}") from None
