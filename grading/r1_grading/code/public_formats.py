"""Tests of programs as public data sets write them, read as the project's own form.

| written by | form |
|---|---|
| APPS, TACO, Eurus-2-RL | `{"inputs": […], "outputs": […], "fn_name": …}` |
| open-r1, SYNTHETIC-1 | `{"language": …, "test_cases": [{"input", "output", "fn_name", "type"}]}` |
| LiveCodeBench, DeepCoder | `[{"input", "output", "testtype", "metadata": {"func_name"}}]` |
| CodeContests | `{"public_tests": {"input": […], "output": […]}, "private_tests": …}` |
| MBPP, AceCode | `["assert f(1) == 2", …]`, or these as one text, or as `{"test_list": …}` |
| HumanEval, KodCode, Skywork-OR1 | Python, `check(candidate)` or `test_…()` with such asserts |

Each may be JSON text or the text of a Python value, and so may what is in it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1_grading.base.errors import shorten
from r1_grading.base.values import decode_literal
from r1_grading.code.asserts import (
    is_asserts,
    is_check_code,
    read_asserts,
    read_check_code,
)

LANGUAGE_ALIASES = {
    **dict.fromkeys(("python", "python3", "py", "py3", "pypy", "pypy3", "cpython"), "python"),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "g++", "gnu c++"), "cpp"),
}
"""Language as data sets spell it → as the reward does."""
MAX_HEAD = 20_000
CODECONTESTS = ("public_tests", "private_tests", "generated_tests")
ASSERT_KEYS = ("test_list", "asserts", "assert_list")
FUNCTION_KEYS = ("fn_name", "func_name", "function_name", "entry_point")
CHECK_KEYS = ("functional", "test")
TEST_KEYS = (
    "tests",
    "inputs",
    "outputs",
    "test_cases",
    "public_test_cases",
    *CODECONTESTS,
    *ASSERT_KEYS,
    "functional",
)
TESTS_START = re.compile(
    rf"""\s*(?:\{{.{{0,200}}?["'](?:{"|".join(TEST_KEYS)})["']\s*:"""
    r"""|\[\s*\{[^{}]{0,200}?["'](?:input|output|stdin)["']\s*:|\[\s*["']assert )""",
    re.DOTALL,
)
"""The start of text that is tests, as JSON or as Python writes them."""
KINDS_OF_CALLS = ("function_call", "functional", "call_based")


def parse_language(name: object) -> str | None:
    """Return "python" or "cpp" for a language as data sets spell it.

    They write `Python`, `python3` or `C++17`; None for null or blank.

    Raises:
        ValueError: another language.
    """
    if name is None or (isinstance(name, str) and not name.strip()):
        return None
    folded_name = name.strip().casefold() if isinstance(name, str) else ""
    language = LANGUAGE_ALIASES.get(folded_name) or LANGUAGE_ALIASES.get(
        folded_name.rstrip("0123456789. ")
    )
    if language is None:
        raise ValueError(f"language must be one of python, cpp, got {name!r}")
    return language


def convert_public_format(truth: Any) -> dict[str, Any] | None:
    """Return {"tests", "function", "tolerance", "language"} of a public data set's truth.

    None for any other form.

    Raises:
        ValueError: the truth has such a form but does not add up, as with unequal numbers of inputs
            and outputs.
    """
    if isinstance(truth, list):
        if not truth:
            return None
        if all(isinstance(test, str) for test in truth):
            return read_asserts(truth)
        return _read_test_cases({"test_cases": truth}) if _is_list_of_cases(truth) else None
    if isinstance(truth, str) and is_check_code(truth):
        return read_check_code(truth, None)
    if not isinstance(truth, Mapping):
        return None
    for shape, convert in SHAPES:
        if any(name in truth for name in shape):
            return convert(truth)
    if isinstance(truth.get("input"), list) and isinstance(truth.get("output"), list):
        return _read_lists({"inputs": truth["input"], "outputs": truth["output"]})
    return None


def is_tests(truth: Any) -> bool:
    """Return whether a truth has the form of tests of a program, by its keys alone."""
    if isinstance(truth, str):
        if is_asserts(truth[:MAX_HEAD]) or is_check_code(truth[:MAX_HEAD]):
            return True
        return TESTS_START.match(truth) is not None
    if isinstance(truth, list):
        texts = bool(truth) and all(isinstance(test, str) for test in truth)
        return _is_list_of_cases(truth) if not texts else all(map(is_asserts, truth))
    if not isinstance(truth, Mapping):
        return False
    code = truth.get("test")
    return (
        any(truth.get(key) is not None for key in TEST_KEYS)
        or all(isinstance(truth.get(key), list) for key in ("input", "output"))
        or (isinstance(code, str) and is_check_code(code))
    )


def _read_lists(truth: Mapping[str, Any]) -> dict[str, Any]:
    inputs, outputs = (decode_literal(truth.get(name)) for name in ("inputs", "outputs"))
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("inputs and outputs must be lists, one entry a test")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: give one output each")
    function = _function_name(truth)
    convert = _read_call if function else _read_streams
    return {
        "tests": [convert(*pair) for pair in zip(inputs, outputs, strict=True)],
        "function": function,
        "tolerance": truth.get("tolerance"),
        "language": truth.get("language"),
    }


def _read_test_cases(truth: Mapping[str, Any]) -> dict[str, Any]:
    cases = decode_literal(truth.get("test_cases"))
    if isinstance(cases, Mapping):
        return _read_lists(
            {**truth}
            | {f"{name}s": cases.get(name, cases.get(f"{name}s")) for name in ("input", "output")}
            | {key: cases[key] for key in FUNCTION_KEYS if cases.get(key)}
        )
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"test_cases must be a list of at least one test, got {shorten(cases)}")
    if all(isinstance(case, str) for case in cases):
        return read_asserts(cases) | {"language": truth.get("language")}
    if not all(isinstance(case, Mapping) for case in cases):
        raise ValueError(f"a test must be an object, got {shorten(cases[0])}")
    names = {_function_name(case) or _function_name(truth) for case in cases}
    if len(names) > 1:
        raise ValueError(f"the tests call several functions: {', '.join(sorted(map(str, names)))}")
    (function,) = names
    if function is None and any(_case_kind(case) in KINDS_OF_CALLS for case in cases):
        raise ValueError("tests of type function_call without the function's name (fn_name)")
    return _read_lists(
        {
            "inputs": [case.get("input") for case in cases],
            "outputs": [case.get("output") for case in cases],
            "fn_name": function,
            "tolerance": truth.get("tolerance"),
            "language": truth.get("language"),
        }
    )


def _read_codecontests(truth: Mapping[str, Any]) -> dict[str, Any]:
    pairs: dict[str, list[Any]] = {"inputs": [], "outputs": []}
    for name in CODECONTESTS:
        part = decode_literal(truth.get(name))
        if isinstance(part, list):
            part = {key: [test.get(key) for test in part] for key in ("input", "output")}
        if isinstance(part, Mapping):
            pairs["inputs"] += part.get("input") or []
            pairs["outputs"] += part.get("output") or []
    return _read_lists({**truth, **pairs})


def _read_assert_field(truth: Mapping[str, Any]) -> dict[str, Any]:
    asserts = decode_literal(next(truth[key] for key in ASSERT_KEYS if key in truth))
    lines = [asserts] if isinstance(asserts, str) else asserts
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"asserts must be a list of text, got {shorten(asserts)}")
    return read_asserts(lines)


def _check_code(truth: Mapping[str, Any]) -> dict[str, Any]:
    """Read HumanEval's {test, entry_point}, Skywork-OR1's {functional}, KodCode's {test}."""
    code = next(truth[key] for key in CHECK_KEYS if key in truth)
    return read_check_code(code, truth.get("entry_point"))


def _read_public_test_cases(truth: Mapping[str, Any]) -> dict[str, Any]:
    """Read LiveCodeBench's rows; its private tests are a pickle, which is not read."""
    return _read_test_cases({**truth, "test_cases": truth["public_test_cases"]})


def _read_streams(stdin: Any, stdout: Any) -> dict[str, Any]:
    return {"stdin": _join_lines(stdin, "input"), "stdout": _join_lines(stdout, "output")}


def _join_lines(value: Any, field: str) -> str:
    """Return the text of an input or output that may be a list of lines, or a number."""
    if isinstance(value, list) and all(isinstance(line, str | int | float) for line in value):
        return "\n".join(map(str, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None and field == "input":
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text or a list of lines, got {shorten(repr(value))}")
    return value


def _read_call(args: Any, result: Any) -> dict[str, Any]:
    """Read a call and its result.

    The call is the list of arguments, or text with one JSON argument a line; APPS writes the result
    in a list of its own too."""
    is_text = isinstance(args, str)
    if isinstance(args, str):
        args = [json.loads(line) for line in args.split("\n") if line.strip()]
    if is_text and isinstance(result, str):
        result = json.loads(result)
    is_mapping = isinstance(args, Mapping)
    if not is_mapping and not isinstance(args, list):
        raise ValueError(f"the input of a call must be a list of arguments, got {shorten(args)}")
    test = {
        "args": [] if is_mapping else args,
        "kwargs": dict(args) if is_mapping else {},
        "result": result,
    }
    if not is_text and isinstance(result, list) and len(result) == 1:
        test["also"] = result[0]
    return test


def _function_name(source: Mapping[str, Any]) -> str | None:
    metadata = decode_literal(source.get("metadata"))
    places = [source, metadata] if isinstance(metadata, Mapping) else [source]
    name = next((p[key] for p in places for key in FUNCTION_KEYS if p.get(key)), None)
    return name.rpartition(".")[2] if isinstance(name, str) else name


def _case_kind(case: Mapping[str, Any]) -> Any:
    return case.get("type") or case.get("testtype")


def _is_list_of_cases(truth: Sequence[Any]) -> bool:
    return bool(truth) and all(
        isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in truth
    )


SHAPES: tuple[tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]], ...] = (
    (("inputs", "outputs"), _read_lists),
    (("test_cases",), _read_test_cases),
    (CODECONTESTS, _read_codecontests),
    (ASSERT_KEYS, _read_assert_field),
    (("public_test_cases",), _read_public_test_cases),
    (CHECK_KEYS, _check_code),
)
"""(a key that the form has, how it is read)"""
