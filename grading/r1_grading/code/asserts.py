"""Read asserts, and the Python code that has them, as tests of a function.

`assert f(1) == 2` is a call and its result."""

import ast
import json
import re
from collections.abc import Iterable
from typing import Any

from r1_grading.base.errors import shorten

CHECK_FUNCTION = re.compile(r"^[ \t]*def (?:check\(|test_?\w*\()", re.MULTILINE)
"""HumanEval's function, pytest's functions."""
CANDIDATE = "candidate"
"""What HumanEval's function calls its argument, the function under test."""


def is_asserts(text: str) -> bool:
    """Return whether a text is a list of asserts rather than JSON."""
    return any(line.lstrip().startswith("assert ") for line in text.splitlines())


def is_check_code(text: str) -> bool:
    """Return whether a text is Python code of a function that has the asserts in it."""
    return CHECK_FUNCTION.search(text) is not None and "assert" in text


def split_asserts(text: str) -> list[str]:
    """Return the assert statements of a text.

    Raises:
        ValueError: the text is not Python.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the asserts are not Python: {shorten(error)}") from None
    return [ast.unparse(line) for line in body if not isinstance(line, ast.Import | ast.ImportFrom)]


def read_asserts(texts: Iterable[str]) -> dict[str, Any]:
    """Return {"tests", "function", "tolerance"} of texts with asserts.

    Raises:
        ValueError: an assert is not a call compared with a literal, or the asserts call several
            functions.
    """
    return _tests_of_lines([line for text in texts for line in split_asserts(text)])


def read_check_code(code: Any, function: str | None) -> dict[str, Any]:
    """Return as `read_asserts` the asserts of all functions in Python code.

    Args:
        code: the Python code of a check.
        function: the one under test, where the code calls it `candidate`; None: the argument of its
            `check(…)`, else the name that it calls."""
    if not isinstance(code, str) or not is_check_code(code):
        raise ValueError(f"test must be Python code with asserts, got {shorten(code)}")
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are not Python: {shorten(error)}") from None
    asserts = [node for node in nodes if isinstance(node, ast.Assert)]
    asserts.sort(key=lambda node: node.lineno)
    constant_asserts = [n for n in asserts if isinstance(n.test, ast.Constant) and n.test.value]
    tests = _tests_of_lines([ast.unparse(node) for node in asserts if node not in constant_asserts])
    if tests["function"] == CANDIDATE:
        entry_point = function or _checked_function(nodes)
        if not entry_point:
            raise ValueError("the tests call a candidate and do not name it: give entry_point")
        tests["function"] = entry_point.rpartition(".")[2]
    return tests


def _checked_function(nodes: Iterable[ast.AST]) -> str | None:
    """Return the argument of `check(f)` or `check(Solution().f)`."""
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name("check"), args=[argument]):
                return ast.unparse(argument)
    return None


def _tests_of_lines(lines: Iterable[str]) -> dict[str, Any]:
    checks = [_read_assert(line) for line in lines]
    names = {name for name, _, _ in checks}
    if not names:
        raise ValueError(
            "the tests have no assert statement; those of unittest.TestCase are not read: write "
            "them as asserts, or give data.kind a reward of your own"
        )
    if len(names) > 1:
        raise ValueError(f"the asserts call {len(names)} functions, one is read: {sorted(names)}")
    tolerances = [tolerance for _, _, tolerance in checks if tolerance is not None]
    tests = [test for _, test, _ in checks]
    return {"tests": tests, "function": names.pop(), "tolerance": min(tolerances, default=None)}


def _read_assert(line: str) -> tuple[str, dict[str, Any], float | None]:
    """Return (function, test, tolerance) of an assert.

    Read are `assert abs(f(1) - 0.5) < 1e-6`, `assert f(1) == 2`, `assert f(1)` and
    `assert not f(1)`."""
    refusal = f"{shorten(line)!r} is no assert of a call and a literal, such as assert f(1) == 2"
    try:
        statement = ast.parse(line).body[0]
    except SyntaxError:
        raise ValueError(refusal) from None
    condition = statement.test if isinstance(statement, ast.Assert) else None
    call: ast.expr | None
    expected: ast.expr = ast.Constant(True)
    tolerance = None
    match condition:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]) if _is_own_call(
            left
        ):
            call, expected = left, right
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            call, expected = right, left
        case ast.Compare(
            left=ast.Call(
                func=ast.Name("abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]
            ),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[ast.Constant(float(most))],
        ):
            call, expected, tolerance = left, right, most
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
    test = {"args": args, "kwargs": kwargs, "result": result}
    return name.rpartition(".")[2], test, tolerance


def _is_own_call(node: ast.expr | None) -> bool:
    """Return whether an expression calls `f` or `Solution().f`."""
    return isinstance(node, ast.Call) and (
        isinstance(node.func, ast.Name)
        or (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call))
    )
