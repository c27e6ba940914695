"""What a Python file computes, to compare two versions of it: its compiled instructions.

Comments, docstrings, formatting and the names of local variables are not in them."""

import ast
from functools import cache
from types import CodeType
from typing import Any

HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache  # claims of many commits ask for the same texts
def instructions_of(text: str) -> tuple[Any, ...]:
    """Return the instructions of a Python file, to compare with those of another version.

    They are those of the Python that runs this: two results of two Pythons do not compare.

    Raises:
        SyntaxError: The text is not Python.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if node.body[1:] else [ast.Pass(lineno=1, col_offset=0)]
    return _instructions(compile(tree, "", "exec", dont_inherit=True))


def _instructions(code: CodeType) -> tuple[Any, ...]:
    # Instructions read a local variable by its number, so that its name computes nothing; that of a
    # parameter is in calls. The flags say whether there are `*args` and `**keywords`.
    return (
        code.co_name,
        code.co_code,
        code.co_exceptiontable,
        tuple(map(_constant, code.co_consts)),
        code.co_names,
        code.co_varnames[: code.co_argcount + code.co_kwonlyargcount],
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        code.co_flags,
    )


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _instructions(value)
    if isinstance(value, tuple | frozenset):
        return type(value), type(value)(map(_constant, value))
    return type(value), repr(value)  # 0, 0.0, -0.0 and False are equal
