"""What a Python file computes, to compare two versions of it: its compiled instructions.

Comments, docstrings, formatting and the names of local variables are not in them."""

import ast
import inspect
from types import CodeType
from typing import Any

ARGUMENT_LISTS = (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)
"""Flags of the code of a function that takes `*args`, and of one that takes `**keywords`."""


def instructions_of(text: str) -> tuple[Any, ...]:
    """Return the instructions of a Python file, to compare with those of another version.

    They are those of the Python that runs this: two results of two Pythons do not compare.

    Raises:
        SyntaxError: The text is not Python.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body[:1] = [] if node.body[1:] else [ast.Pass(lineno=1, col_offset=0)]
    return _instructions(compile(tree, "", "exec", dont_inherit=True))


def _instructions(code: CodeType) -> tuple[Any, ...]:
    # Instructions read a local variable by its number, so that its name computes nothing; that of a
    # parameter is in calls.
    num_parameters = code.co_argcount + code.co_kwonlyargcount
    num_lists = sum(bool(code.co_flags & flag) for flag in ARGUMENT_LISTS)
    return (
        code.co_name,
        code.co_code,
        code.co_exceptiontable,
        tuple(map(_constant, code.co_consts)),
        code.co_names,
        code.co_varnames[:num_parameters],
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, num_lists),
        code.co_flags,
    )


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _instructions(value)
    if isinstance(value, tuple | frozenset):
        parts = map(_constant, value)
        return type(value).__name__, tuple(
            sorted(parts, key=repr) if isinstance(value, frozenset) else parts
        )
    # 0, 0.0, -0.0 and False are equal.
    return type(value).__name__, repr(value)
