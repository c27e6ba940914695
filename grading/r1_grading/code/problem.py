"""Parse and validate the truth of a code prompt: its tests and how they are judged."""

from dataclasses import dataclass
from typing import Any

from r1_grading.base.errors import did_you_mean
from r1_grading.base.values import decoded, load_json
from r1_grading.code.published import (
    is_asserts,
    is_check_code,
    language_of,
    own_form,
    split_asserts,
)

WHAT = "the truth of a code prompt"
KEYS = ("tests", "function", "checker", "tolerance")
LIVECODEBENCH_KEYS = {"input", "output"}
# LiveCodeBench's rows have a "testtype"; here the key "function" decides, and it is ignored.
PROGRAM_KEYS = ("stdin", "stdout", "input", "output", "testtype")
CALL_KEYS = ("args", "kwargs", "result", "also", "input", "output", "testtype")


@dataclass(frozen=True)
class Test:
    """One test: stdin and expected (text) of a program, or args, kwargs and expected (JSON values)
    of a function call. alternatives: other results that count as the expected one."""

    expected: Any
    stdin: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    alternatives: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A programming problem, as its tests define it.

    tests: at least one.
    function: the name to call, or None where the program reads and prints.
    checker: source of a Python program that replaces the comparison, or None.
    tolerance: allowed difference of numbers, or None for that of floats only (see `compare`).
    is_livecodebench: the tests have LiveCodeBench's form, or another of public data sets. Integers
        are compared by value, and a script has the names that its harness imports, as a function
        always has.
    language: "python" or "cpp"."""

    tests: tuple[Test, ...]
    function: str | None = None
    checker: str | None = None
    tolerance: float | None = None
    is_livecodebench: bool = False
    language: str = "python"


def parse_problem(truth: object, language: str | None = None) -> Problem:
    """Parse `truth`: an object, a form of `published`, or the JSON text of either.

    language: of the prompt, as `published.language_of` reads it; None: the truth's own, else
    Python. A key whose value is null counts as absent: Arrow fills the keys of nested columns that
    a row lacks. Raises ValueError naming the faulty test."""
    asked = language_of(language)
    if isinstance(truth, str):
        truth = _read(truth)
    if isinstance(truth, dict):
        truth = _without_nulls(truth)
    try:
        published = own_form(truth)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{WHAT}: {error}") from None
    is_published = published is not None
    if published is not None:
        own = language_of(published.pop("language", None))
        if asked and own and asked != own:
            raise ValueError(f"{WHAT} is for {own}, and the prompt's language is {asked}")
        asked = asked or own
        truth = published
    if not isinstance(truth, dict):
        raise ValueError(f'{WHAT} must be {{"tests": […]}}, got {type(truth).__name__}')
    language = asked or "python"
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
    is_livecodebench = is_published or all(
        isinstance(t, dict) and t.keys() >= LIVECODEBENCH_KEYS for t in tests
    )
    return Problem(
        tuple(parse(test, f"{WHAT}: test {i}", checker) for i, test in enumerate(tests, 1)),
        function,
        checker,
        tolerance,
        is_livecodebench,
        language,
    )


def _read(truth: str) -> Any:
    """Return the value of a truth in text: asserts, code with asserts, JSON, or a Python value."""
    if is_check_code(truth):
        return truth
    if is_asserts(truth):
        return split_asserts(truth)
    try:
        return load_json(truth)
    except (ValueError, RecursionError):
        value = decoded(truth)
        return value if value is not truth else _json(truth, WHAT)


def _without_nulls(truth: dict[str, Any]) -> dict[str, Any]:
    """Return the truth without keys of null, at the depths whose names are fixed. The result of a
    call stays: a function may return None. Of keyword arguments a name goes that is null in every
    test, while another has a value."""
    truth = {key: value for key, value in truth.items() if value is not None}
    tests = truth.get("tests")
    if not isinstance(tests, list):
        return truth
    kept = ("result",) if "function" in truth else ()
    tests = [
        {k: v for k, v in test.items() if v is not None or (k in kept and "args" in test)}
        if isinstance(test, dict)
        else test
        for test in tests
    ]
    named = [t for t in tests if isinstance(t, dict) and isinstance(t.get("kwargs"), dict)]
    used = {name for test in named for name, value in test["kwargs"].items() if value is not None}
    for test in named if used else ():
        test["kwargs"] = {name: v for name, v in test["kwargs"].items() if name in used}
    return {**truth, "tests": tests}


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
    also = (test["also"],) if "also" in test else ()
    return Test(expected=expected, args=tuple(args), kwargs=kwargs, alternatives=also)


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


def _json(text: str, what: str) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}): {text[:80]!r}") from None
