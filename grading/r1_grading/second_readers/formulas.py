"""Formulas as the second reader knows them, and whether two have equal values at random points.

Values of rational operations on numbers are exact (`Fraction`); all others have `PRECISION_DIGITS`
digits, so that two formulas which agree at all points to `EQUALITY_TOLERANCE` are taken as the
same."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath

MAX_BITS = 50_000
MAX_FACTORIAL = 500
PRECISION_DIGITS = 100
EQUALITY_TOLERANCE = mpmath.mpf("1e-60")
"""Largest relative difference of equal values, of 100 digits."""
ROUNDING_TOLERANCE = Fraction(1, 100)
"""Where a side has a decimal, smaller relative differences may be a rounding."""
NUM_POINTS = 12
DECADES = -1.0, 3.5
"""Between these powers of ten are the letters' magnitudes, so that |x - 5| is not 5 - x."""
MPMATH_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(mpmath, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "exp")},
    **{"ln": mpmath.log, "asin": mpmath.asin, "acos": mpmath.acos, "atan": mpmath.atan},
    **{"arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan},
}
SIGN_NODES = {"negative", "plus", "minus", "times", "divided", "power"}
ARITHMETIC = {"number", "letter", "constant", *SIGN_NODES}


@dataclass(frozen=True)
class Node:
    """A part of a formula.

    Attributes:
        name: the operation, "number" or "letter".
        parts: its operands.
        value: the number, or the name of a letter or constant.
        is_decimal: whether a number is written with a point."""

    name: str
    parts: tuple[Node, ...] = ()
    value: Any = None
    is_decimal: bool = False

    def walk(self) -> list[Node]:
        """Return the node and all nodes below it, each before its own parts."""
        return [self, *itertools.chain.from_iterable(part.walk() for part in self.parts)]

    @property
    def letters(self) -> set[str]:
        """The letters that stand for any value."""
        return {node.value for node in self.walk() if node.name == "letter"}

    @property
    def has_decimal(self) -> bool:
        """Whether a number in it is written with a decimal point."""
        return any(node.is_decimal for node in self.walk())

    @property
    def functions(self) -> set[str]:
        """The names of its roots, logarithms and other functions."""
        return {node.name for node in self.walk()} - ARITHMETIC

    @property
    def num_operations(self) -> int:
        """How many operations are left to do; a sign and a fraction in lowest terms are none."""
        if self.name == "negative":
            return self.parts[0].num_operations + (self.parts[0].name == "negative")
        if self.name == "divided" and all(is_whole(part) for part in self.parts):
            numerator, denominator = (part.value for part in self.parts)
            return 0 if denominator > 1 and math.gcd(int(numerator), int(denominator)) == 1 else 1
        num_here = 0 if self.name in ("number", "letter") or self in (PI, E, I) else 1
        return num_here + sum(part.num_operations for part in self.parts)


PI, E, I = (Node("constant", value=name) for name in ("pi", "e", "i"))  # noqa: E741


def same_formula_values(expected: Node, answer: Node, seed: str) -> bool | None:
    """Whether two formulas have equal values for all values of their letters; None if not sure.

    The answer has to be worked out as far as the truth.

    Args:
        expected: the truth's formula.
        answer: the response's.
        seed: chooses the points."""
    names = sorted(expected.letters | answer.letters)
    if expected.name == answer.name == "letter":  # of a choice
        return expected.value == answer.value
    if expected.letters != answer.letters:
        # A letter may be a unit: 5 m for 5.
        verdict = _compare_at_point(expected, answer, dict.fromkeys(names, Fraction(1)))
        return None if verdict is not False else False
    rng = random.Random(seed)
    verdicts = []
    for _ in range(NUM_POINTS if names else 1):
        point = {
            name: mpmath.mpf(rng.choice((-1, 1)) * 10 ** rng.uniform(*DECADES)) for name in names
        }
        verdicts.append(_compare_at_point(expected, answer, point))
    if False in verdicts:
        # Only the sign of a root's argument may differ at negative values.
        return False if not _has_branches(expected, answer) else None
    if None in verdicts:
        return None
    is_open = not names and answer.num_operations > expected.num_operations
    return None if is_open or answer.functions - expected.functions else True


def _compare_at_point(expected: Node, answer: Node, point: Mapping[str, Any]) -> bool | None:
    with mpmath.workdps(PRECISION_DIGITS):
        try:
            left, right = (_evaluate_node(node, point) for node in (expected, answer))
        except (ZeroDivisionError, OverflowError, ValueError):
            return None
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            if left == right:
                return True
            is_near = abs(left - right) <= ROUNDING_TOLERANCE * max(abs(left), abs(right))
        else:
            left, right = _to_mpmath(left), _to_mpmath(right)
            if not (mpmath.isfinite(left) and mpmath.isfinite(right)):
                return None
            size = max(abs(left), abs(right))
            if abs(left - right) <= EQUALITY_TOLERANCE * size:
                return True
            is_near = abs(left - right) <= _to_mpmath(ROUNDING_TOLERANCE) * size
    return None if is_near and (expected.has_decimal or answer.has_decimal) else False


def _has_branches(*formulas: Node) -> bool:
    names = {"absolute", "ln", "asin", "acos", "arcsin", "arccos"}
    for node in itertools.chain.from_iterable(formula.walk() for formula in formulas):
        is_power = node.name == "power" and not is_whole(node.parts[1])
        if (node.name == "root" and node.parts[1].letters) or (
            (is_power or node.name in names) and node.parts[0].letters
        ):
            return True
    return False


def is_whole(node: Node) -> bool:
    """Whether a node is a whole number."""
    return node.name == "number" and node.value.denominator == 1 and not node.is_decimal


def is_open_sum(node: Node) -> bool:
    """Whether a node only adds or subtracts numbers: it may be a date, or is not worked out."""
    nodes = node.walk()
    has_sum = any(part.name in ("plus", "minus") for part in nodes)
    return has_sum and all(part.name in ("number", "plus", "minus", "negative") for part in nodes)


def _to_mpmath(value: Any) -> Any:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _evaluate_node(node: Node, point: Mapping[str, Any]) -> Any:
    """Return a Fraction where all below is rational, else a number of mpmath."""
    if node.name == "number":
        return node.value
    if node.name == "letter":
        return point[node.value]
    if node.name == "constant":
        return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[node.value]
    parts = [_evaluate_node(part, point) for part in node.parts]
    if node.name == "power":
        return _take_power(*parts)
    are_exact = all(isinstance(part, Fraction) for part in parts)
    if not are_exact:
        parts = [_to_mpmath(part) for part in parts]
    match node.name:
        case "plus":
            return parts[0] + parts[1]
        case "minus":
            return parts[0] - parts[1]
        case "times":
            return parts[0] * parts[1]
        case "divided":
            return parts[0] / parts[1]
        case "negative":
            return -parts[0]
        case "absolute":
            return abs(parts[0])
        case "factorial":
            if not are_exact or parts[0].denominator != 1 or not 0 <= parts[0] <= MAX_FACTORIAL:
                raise ValueError("a factorial")
            return Fraction(math.factorial(int(parts[0])))
        case "root":
            return _take_root(_to_mpmath(parts[1]), int(parts[0]))
        case "log":
            return mpmath.log(_to_mpmath(parts[1])) / mpmath.log(_to_mpmath(parts[0]))
    return MPMATH_FUNCTIONS[node.name](_to_mpmath(parts[0]))


def _take_root(base: Any, index: int) -> Any:
    """Return the real root of a negative number where the index is odd."""
    if mpmath.im(base) == 0 and mpmath.re(base) < 0 and index % 2:
        return -mpmath.root(-base, index)
    return mpmath.root(base, index)


def _take_power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > MAX_BITS:
            raise OverflowError("a power")
        return base ** int(exponent)
    is_whole_power = isinstance(exponent, Fraction) and exponent.denominator == 1
    base, exponent = _to_mpmath(base), _to_mpmath(exponent)
    if base == 0 or (mpmath.re(base) < 0 and not is_whole_power):
        raise ValueError("a power that has several values")
    if abs(exponent) * abs(mpmath.log(abs(base), 2)) > MAX_BITS:
        raise OverflowError("a power")
    return mpmath.power(base, exponent)
