"""Tests of programs as public data sets write them, read as the project's own form.

| written by | form |
|---|---|
| APPS, TACO, Eurus-2-RL | `{"inputs": […], "outputs": […], "fn_name": …}` |
| open-r1, SYNTHETIC-1 | `{"language": …, "test_cases": [{"input", "output", "fn_name", "type"}]}` |
| LiveCodeBench, DeepCoder | `[{"input", "output", "testtype", "metadata": {"func_name"}}]` |
| CodeContests | `{"public_tests": {"input": […], "output": […]}, "private_tests": …}` |
| MBPP, AceCode | `["assert f(1) == 2", …]`, or these as one text, or as `{"test_list": …}` |

Each may be JSON text, and so may what is in it."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_r1.rewards.base import shorten

LANGUAGES = {
    **dict.fromkeys(("python", "python3", "py", "py3", "pypy", "pypy3", "cpython"), "python"),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "g++", "gnu c++"), "cpp"),
}
"""Language as data sets spell it → as the reward does."""
MAX_HEAD = 20_000
CODECONTESTS = ("public_tests", "private_tests", "generated_tests")
ASSERT_KEYS = ("test_list", "asserts", "assert_list")
FUNCTION_KEYS = ("fn_name", "func_name", "function_name", "entry_point")
TEST_KEYS = ("tests", "inputs", "outputs", "test_cases", *CODECONTESTS, *ASSERT_KEYS)
HEAD = re.compile(
    rf'\s*(?:\{{.{{0,200}}?"(?:{"|".join(TEST_KEYS)})"\s*:'
    r'|\[\s*\{\s*"(?:input|output|stdin)"\s*:|\[\s*"assert )',
    re.DOTALL,
)
"""The start of JSON text that is tests."""
KINDS_OF_CALLS = ("function_call", "functional", "call_based")


def language_of(name: object) -> str | None:
    """Return "python" or "cpp" for a language as data sets spell it (`Python`, `python3`, `C++17`),
    None for null or blank. Raises ValueError for any other."""
    if name is None or (isinstance(name, str) and not name.strip()):
        return None
    plain = name.strip().casefold() if isinstance(name, str) else ""
    found = LANGUAGES.get(plain) or LANGUAGES.get(plain.rstrip("0123456789. "))
    if found is None:
        raise ValueError(f"language must be one of python, cpp, got {name!r}")
    return found


def own_form(truth: Any) -> dict[str, Any] | None:
    """Return {"tests", "function", "tolerance", "language"} of a truth in a public data set's form,
    None for any other. Raises ValueError for one that has such a form and does not add up."""
    if isinstance(truth, list):
        if not truth:
            return None
        if all(isinstance(test, str) for test in truth):
            return _asserts(truth)
        return _test_cases({"test_cases": truth}) if _is_list_of_cases(truth) else None
    if not isinstance(truth, Mapping):
        return None
    for shape, convert in SHAPES:
        if any(name in truth for name in shape):
            return convert(truth)
    if isinstance(truth.get("input"), list) and isinstance(truth.get("output"), list):
        return _lists({"inputs": truth["input"], "outputs": truth["output"]})
    return None


def is_tests(truth: Any) -> bool:
    """Return whether a truth has the form of tests of a program, by its keys alone."""
    if isinstance(truth, str):
        if is_asserts(truth[:MAX_HEAD]):
            return True
        return HEAD.match(truth) is not None
    if isinstance(truth, list):
        texts = bool(truth) and all(isinstance(test, str) for test in truth)
        return _is_list_of_cases(truth) if not texts else all(map(is_asserts, truth))
    if not isinstance(truth, Mapping):
        return False
    return any(truth.get(key) is not None for key in TEST_KEYS) or all(
        isinstance(truth.get(key), list) for key in ("input", "output")
    )


def is_asserts(text: str) -> bool:
    """Return whether a text is a list of asserts rather than JSON."""
    return any(line.lstrip().startswith("assert ") for line in text.splitlines())


def split_asserts(text: str) -> list[str]:
    """Return the assert statements of a text. Raises ValueError for a text that is no Python."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the asserts are not Python: {shorten(error)}") from None
    return [ast.unparse(line) for line in body if not isinstance(line, ast.Import | ast.ImportFrom)]


def _lists(truth: Mapping[str, Any]) -> dict[str, Any]:
    inputs, outputs = (_decoded(truth.get(name)) for name in ("inputs", "outputs"))
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("inputs and outputs must be lists, one entry a test")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: give one output each")
    function = _function(truth)
    convert = _call if function else _program
    return {
        "tests": [convert(*pair) for pair in zip(inputs, outputs, strict=True)],
        "function": function,
        "tolerance": truth.get("tolerance"),
        "language": truth.get("language"),
    }


def _test_cases(truth: Mapping[str, Any]) -> dict[str, Any]:
    cases = _decoded(truth.get("test_cases"))
    if isinstance(cases, Mapping):
        return _lists(
            {**truth}
            | {f"{name}s": cases.get(name, cases.get(f"{name}s")) for name in ("input", "output")}
            | {key: cases[key] for key in FUNCTION_KEYS if cases.get(key)}
        )
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"test_cases must be a list of at least one test, got {shorten(cases)}")
    if all(isinstance(case, str) for case in cases):
        return _asserts(cases) | {"language": truth.get("language")}
    if not all(isinstance(case, Mapping) for case in cases):
        raise ValueError(f"a test must be an object, got {shorten(cases[0])}")
    names = {_function(case) or _function(truth) for case in cases}
    if len(names) > 1:
        raise ValueError(f"the tests call several functions: {', '.join(sorted(map(str, names)))}")
    (function,) = names
    if function is None and any(_kind(case) in KINDS_OF_CALLS for case in cases):
        raise ValueError("tests of type function_call without the function's name (fn_name)")
    return _lists(
        {
            "inputs": [case.get("input") for case in cases],
            "outputs": [case.get("output") for case in cases],
            "fn_name": function,
            "tolerance": truth.get("tolerance"),
            "language": truth.get("language"),
        }
    )


def _codecontests(truth: Mapping[str, Any]) -> dict[str, Any]:
    pairs: dict[str, list[Any]] = {"inputs": [], "outputs": []}
    for name in CODECONTESTS:
        part = _decoded(truth.get(name))
        if isinstance(part, list):
            part = {key: [test.get(key) for test in part] for key in ("input", "output")}
        if isinstance(part, Mapping):
            pairs["inputs"] += part.get("input") or []
            pairs["outputs"] += part.get("output") or []
    return _lists({**truth, **pairs})


def _asserts(truth: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read asserts of a call and a literal: the call's arguments and its result."""
    if isinstance(truth, Mapping):
        found = _decoded(next(truth[key] for key in ASSERT_KEYS if key in truth))
        lines = [found] if isinstance(found, str) else found
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"asserts must be a list of text, got {shorten(found)}")
    else:
        lines = list(truth)
    tests, names = [], set()
    for line in [part for text in lines for part in split_asserts(text)]:
        name, test = _read_assert(line)
        names.add(name)
        tests.append(test)
    if len(names) != 1:
        raise ValueError(f"the asserts call {len(names)} functions, one is read: {sorted(names)}")
    return {"tests": tests, "function": names.pop()}


def _read_assert(line: str) -> tuple[str, dict[str, Any]]:
    """Return (function, test) of `assert f(1) == 2`, `assert f(1)` or `assert not f(1)`."""
    refusal = f"{shorten(line)!r} is no assert of a call and a literal, such as assert f(1) == 2"
    try:
        statement = ast.parse(line).body[0]
    except SyntaxError:
        raise ValueError(refusal) from None
    condition = statement.test if isinstance(statement, ast.Assert) else None
    call: ast.expr | None
    expected: ast.expr = ast.Constant(True)
    match condition:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]) if _is_own_call(
            left
        ):
            call, expected = left, right
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            call, expected = right, left
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            call, expected = operand, ast.Constant(False)
        case _:
            call = condition
    if not isinstance(call, ast.Call) or not _is_own_call(call):
        raise ValueError(refusal)
    try:
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg}
        result = json.loads(json.dumps(ast.literal_eval(expected)))
    except (ValueError, TypeError, SyntaxError, RecursionError):
        raise ValueError(refusal) from None
    function = call.func
    name = function.id if isinstance(function, ast.Name) else ast.unparse(function)
    return name.rpartition(".")[2], {"args": args, "kwargs": kwargs, "result": result}


def _is_own_call(node: ast.expr | None) -> bool:
    """Return whether an expression calls `f` or `Solution().f`."""
    return isinstance(node, ast.Call) and (
        isinstance(node.func, ast.Name)
        or (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call))
    )


def _program(stdin: Any, stdout: Any) -> dict[str, Any]:
    return {"stdin": _lines(stdin, "input"), "stdout": _lines(stdout, "output")}


def _lines(value: Any, what: str) -> str:
    """Return the text of an input or output that may be a list of lines, or a number."""
    if isinstance(value, list) and all(isinstance(line, str | int | float) for line in value):
        return "\n".join(map(str, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None and what == "input":
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text or a list of lines, got {shorten(repr(value))}")
    return value


def _call(args: Any, result: Any) -> dict[str, Any]:
    """Read a call: the list of arguments, or text with one JSON argument a line; the result, which
    APPS writes in a list of its own too."""
    is_text = isinstance(args, str)
    if isinstance(args, str):
        args = [json.loads(line) for line in args.split("\n") if line.strip()]
    if is_text and isinstance(result, str):
        result = json.loads(result)
    keyed = isinstance(args, Mapping)
    if not keyed and not isinstance(args, list):
        raise ValueError(f"the input of a call must be a list of arguments, got {shorten(args)}")
    test = {"args": [] if keyed else args, "kwargs": dict(args) if keyed else {}, "result": result}
    if not is_text and isinstance(result, list) and len(result) == 1:
        test["also"] = result[0]
    return test


def _function(source: Mapping[str, Any]) -> str | None:
    metadata = _decoded(source.get("metadata"))
    places = [source, metadata] if isinstance(metadata, Mapping) else [source]
    return next((p[key] for p in places for key in FUNCTION_KEYS if p.get(key)), None)


def _kind(case: Mapping[str, Any]) -> Any:
    return case.get("type") or case.get("testtype")


def _is_list_of_cases(truth: Sequence[Any]) -> bool:
    return bool(truth) and all(
        isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in truth
    )


def _decoded(value: Any) -> Any:
    """Return the JSON value of a text that is JSON, any other value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


SHAPES: tuple[tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]], ...] = (
    (("inputs", "outputs"), _lists),
    (("test_cases",), _test_cases),
    (CODECONTESTS, _codecontests),
    (ASSERT_KEYS, _asserts),
)
"""(a key that the form has, how it is read)"""
