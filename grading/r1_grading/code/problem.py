"""Parse and validate the truth of a code prompt: its tests and how they are judged.

`public_formats` reads the forms of public data sets as this project's."""

from dataclasses import dataclass
from typing import Any

from r1_grading.base.errors import did_you_mean, shorten
from r1_grading.base.values import decode_literal, load_json
from r1_grading.code.asserts import (
    is_asserts,
    is_check_code,
    split_asserts,
)
from r1_grading.code.public_formats import convert_public_format, parse_language

TRUTH_SUBJECT = "the truth of a code prompt"
TRUTH_KEYS = ("tests", "function", "checker", "tolerance")
LIVECODEBENCH_KEYS = {"input", "output"}
# LiveCodeBench's rows have a "testtype"; here the key "function" decides, and it is ignored.
PROGRAM_KEYS = ("stdin", "stdout", "input", "output", "testtype")
CALL_KEYS = ("args", "kwargs", "result", "also", "input", "output", "testtype")


@dataclass(frozen=True)
class Test:
    """One test: the input and output of a program, or the arguments and result of a call.

    Attributes:
        expected: the output as text, or the result as a JSON value.
        stdin: the input of a program.
        args: the JSON values of a function's positional arguments.
        kwargs: those of its keyword arguments, by name.
        alternatives: other results that count as the expected one."""

    expected: Any
    stdin: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    alternatives: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A programming problem, as its tests define it.

    Attributes:
        tests: at least one.
        function: the name to call, or None where the program reads and prints.
        checker: source of a Python program that replaces the comparison, or None.
        tolerance: allowed difference of numbers, or None for that of floats only (`same_output`).
        is_livecodebench: the tests have LiveCodeBench's form, or another of public data sets.
            Integers are compared by value, and a script has the names that its harness imports, as
            a function always has.
        language: "python" or "cpp"."""

    tests: tuple[Test, ...]
    function: str | None = None
    checker: str | None = None
    tolerance: float | None = None
    is_livecodebench: bool = False
    language: str = "python"


def parse_problem(truth: object, language: str | None = None) -> Problem:
    """Parse `truth`: an object, a form of public data sets, or the JSON text of either.

    A key whose value is null counts as absent: Arrow fills the keys of nested columns that a row
    lacks.

    Args:
        truth: the tests of a code prompt.
        language: the prompt's language, as `parse_language` reads it; None: the truth's own, else
            Python.

    Raises:
        ValueError: an invalid truth; it names the faulty test."""
    prompt_language = parse_language(language)
    if isinstance(truth, str):
        truth = _read_truth_text(truth)
    if isinstance(truth, dict):
        truth = _without_nulls(truth)
    try:
        public_problem = convert_public_format(truth)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{TRUTH_SUBJECT}: {error}") from None
    is_published = public_problem is not None
    if public_problem is not None:
        published_language = parse_language(public_problem.pop("language", None))
        if prompt_language and published_language and prompt_language != published_language:
            raise ValueError(
                f"{TRUTH_SUBJECT} is for {published_language}, and the prompt's language is "
                f"{prompt_language}"
            )
        prompt_language = prompt_language or published_language
        truth = public_problem
    if not isinstance(truth, dict):
        raise ValueError(f'{TRUTH_SUBJECT} must be {{"tests": […]}}, got {type(truth).__name__}')
    language = prompt_language or "python"
    _check_keys(truth, TRUTH_SUBJECT, TRUTH_KEYS)
    tests, function = truth.get("tests"), _text_or_none(truth, "function")
    checker, tolerance = _text_or_none(truth, "checker"), truth.get("tolerance")
    if not isinstance(tests, list) or not tests:
        raise ValueError(
            f"{TRUTH_SUBJECT} needs a list of at least one test, got {shorten(repr(tests))}; give "
            "it tests, "
            'such as {"tests": [{"stdin": "1 2", "stdout": "3"}]}, or leave the row out'
        )
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float | None):
        raise ValueError(f"{TRUTH_SUBJECT}: tolerance must be a number, got {tolerance!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(
            f"{TRUTH_SUBJECT}: tolerance must be at least 0 and below 1, got {tolerance!r}"
        )
    if function is not None and (language != "python" or checker is not None):
        conflict = "the checker" if checker is not None else f"language {language!r}"
        raise ValueError(
            f"{TRUTH_SUBJECT}: function-call tests are for python, and without a checker; leave "
            "out "
            f"function {function!r}, or {conflict}"
        )
    if checker is not None and tolerance is not None:
        raise ValueError(
            f"{TRUTH_SUBJECT} has a checker, which decides alone: leave out the tolerance"
        )
    parse = _call_test if function is not None else _program_test
    is_livecodebench = is_published or all(
        isinstance(t, dict) and t.keys() >= LIVECODEBENCH_KEYS for t in tests
    )
    return Problem(
        tuple(
            parse(test, f"{TRUTH_SUBJECT}: test {i}", checker) for i, test in enumerate(tests, 1)
        ),
        function,
        checker,
        tolerance,
        is_livecodebench,
        language,
    )


def _read_truth_text(truth: str) -> Any:
    """Return the value of a truth in text: asserts, code with asserts, JSON, or a Python value."""
    if is_check_code(truth):
        return truth
    if is_asserts(truth):
        return split_asserts(truth)
    try:
        return load_json(truth)
    except (ValueError, RecursionError):
        value = decode_literal(truth)
        return value if value is not truth else _load_json_text(truth, TRUTH_SUBJECT)


def _without_nulls(truth: dict[str, Any]) -> dict[str, Any]:
    """Return the truth without keys of null, at the depths whose names are fixed.

    The result of a call stays: a function may return None. Of keyword arguments a name goes that is
    null in every test, while another has a value."""
    truth = {key: value for key, value in truth.items() if value is not None}
    tests = truth.get("tests")
    if not isinstance(tests, list):
        return truth
    nullable_keys = ("result",) if "function" in truth else ()
    tests = [
        {k: v for k, v in test.items() if v is not None or (k in nullable_keys and "args" in test)}
        if isinstance(test, dict)
        else test
        for test in tests
    ]
    calls = [t for t in tests if isinstance(t, dict) and isinstance(t.get("kwargs"), dict)]
    names = {name for test in calls for name, value in test["kwargs"].items() if value is not None}
    for test in calls if names else ():
        test["kwargs"] = {name: v for name, v in test["kwargs"].items() if name in names}
    return {**truth, "tests": tests}


def _program_test(test: object, subject: str, checker: str | None) -> Test:
    """Parse {"stdin", "stdout"}, or LiveCodeBench's {"input", "output"}.

    With a checker, the expected output may be missing."""
    test = _require_known_keys(test, subject, PROGRAM_KEYS)
    stdin = test.get("stdin", test.get("input", ""))
    stdout = test.get("stdout", test.get("output", "" if checker else None))
    for name, value in (("stdin", stdin), ("stdout", stdout)):
        if not isinstance(value, str):
            raise ValueError(f"{subject}: {name} must be text, got {value!r}")
    return Test(expected=stdout, stdin=stdin)


def _call_test(test: object, subject: str, checker: str | None) -> Test:
    """Parse {"args", "kwargs", "result"}, or LiveCodeBench's {"input", "output"}.

    The latter's input has one JSON argument per line."""
    test = _require_known_keys(test, subject, CALL_KEYS)
    if "result" in test:
        args, kwargs, expected = test.get("args", []), test.get("kwargs", {}), test["result"]
    elif isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
        # Not splitlines(), which also splits at U+2028 and U+0085: JSON texts may contain these.
        lines = [line for line in test["input"].split("\n") if line.strip()]
        args, kwargs = [_load_json_text(line, f"{subject}: an argument") for line in lines], {}
        expected = _load_json_text(test["output"], f"{subject}: output")
    else:
        raise ValueError(
            f"{subject} needs 'args' and 'result', or 'input' and 'output' as JSON text"
        )
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f"{subject}: args must be a list and kwargs an object")
    alternatives = (test["also"],) if "also" in test else ()
    return Test(expected=expected, args=tuple(args), kwargs=kwargs, alternatives=alternatives)


def _require_known_keys(test: object, subject: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return `test` if all its keys are known.

    A misspelt "stdin" would be an empty input, which no correct program passes."""
    if not isinstance(test, dict):
        raise ValueError(f"{subject} must be an object, got {type(test).__name__}")
    _check_keys(test, subject, keys)
    return test


def _check_keys(value: dict[str, Any], subject: str, keys: tuple[str, ...]) -> None:
    if unknown_keys := sorted(value.keys() - set(keys)):
        hint = did_you_mean(unknown_keys[0], keys)
        raise ValueError(f"{subject} has {unknown_keys[0]!r}{hint} (known: {', '.join(keys)})")


def _text_or_none(truth: dict[str, Any], key: str) -> str | None:
    value = truth.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{TRUTH_SUBJECT}: {key} must be text, got {value!r}")
    return value


def _load_json_text(text: str, subject: str) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{subject} is not JSON ({error}): {text[:80]!r}") from None
