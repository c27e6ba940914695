"""Arithmetic with a calculator: sums that are too long to do in the head.

A row's truth is the result; the last integer of the last answer must equal it."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction,
    ast.USub: operator.neg,
}
MAX_CHARS = 200
"""The longest expression; as there are no powers, its result is short, too."""


class Calculator:
    """One tool, `calculate`."""

    def reset(self, truth: object, **row: object) -> None:
        self._truth, self._answer = str(truth), ""

    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: numbers with + - * / and brackets.
        """
        if len(expression) > MAX_CHARS:
            raise ValueError(f"the expression is longer than {MAX_CHARS} characters")
        return str(_value(ast.parse(expression.strip(), mode="eval").body))

    def final_answer(self, text: str) -> None:
        numbers = re.findall(r"-?\d+", text)
        self._answer = numbers[-1] if numbers else ""

    def get_reward(self) -> float:
        return float(self._answer == self._truth)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError("only numbers, + - * / and brackets")
