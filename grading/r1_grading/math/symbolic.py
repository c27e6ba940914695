"""Compare expressions: parse them, evaluate both at random points, and last call math-verify.

math-verify's parser (latex2sympy) is called directly. Its own `parse` searches a text for an
answer, with regular expressions that can take exponential time, and changes it: it drops units
(`2h` becomes 2), primes (`f'` becomes f) and case (`X` becomes x).

`evaluate_expression` is exact for rational operations, and to 120 digits at a point otherwise; like
`exact_rational` it walks the tree once, bounded in time and size. sympy's own `evalf` raises its
precision again and again below a cancellation, which takes exponential time on nested fractions,
and it would compute a number of a billion digits."""

import functools
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from r1_grading.math.number import rounds_to_same

PRECISION_DIGITS = 120
MAX_BITS = 1_000_000
"""Values beyond 2^±1,000,000 are not computed."""
MAX_EXACT_BITS = 100_000
MAX_ANGLE_BITS = 1_000
MAX_FACTORIAL = 10_000
CONSTANTS = {
    sympy.E: lambda: mpmath.e,
    sympy.pi: lambda: mpmath.pi,
    sympy.EulerGamma: lambda: mpmath.euler,
    sympy.I: lambda: mpmath.mpc(0, 1),
}
PERIODIC = ("sin", "cos", "tan", "cot", "sec", "csc")
MPMATH_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(mpmath, name) for name in PERIODIC},
    **{name: getattr(mpmath, name) for name in ("asin", "acos", "atan", "acot", "asec", "acsc")},
    **{name: getattr(mpmath, name) for name in ("asinh", "acosh", "atanh", "tanh", "coth")},
    **{name: getattr(mpmath, name) for name in ("floor", "re", "im", "arg", "sign", "conj")},
    "Abs": abs,
    "ceiling": mpmath.ceil,
    "conjugate": mpmath.conj,
}


class NotNumeric(Exception):
    """There is no rule for a part of the expression."""


class OutOfRange(Exception):
    """A part of the expression is undefined at the point, or too large to compute."""


def evaluate_expression(
    expression: sympy.Basic, values: Mapping[str, Any] | None = None
) -> mpmath.mpc:
    """Return the value with these values of its symbols (by name), to about 120 digits.

    An undefined function f(x) gets a value that depends on f and x alone. Linear in the size of the
    tree.

    Raises:
        NotNumeric: the tree has a part without a number as its value.
        OutOfRange: the value is undefined, or exceeds the limits of time or size.
    """
    with mpmath.workdps(PRECISION_DIGITS):
        try:
            return mpmath.mpc(_evaluate_node(expression, values or {}))
        except (ZeroDivisionError, OverflowError, ValueError) as error:
            raise OutOfRange(str(error)) from error


def exact_rational(node: sympy.Basic) -> Fraction | None:
    """Return the exact value; None with symbols, roots or functions, and if it is too long.

    The digits of an approximation are the same for 2^2024 and 2^2024 - 2."""
    if isinstance(node, sympy.Float):
        return None
    if isinstance(node, sympy.Rational):
        return Fraction(int(node.p), int(node.q)) if node.q else None
    if not isinstance(node, sympy.Expr) or not node.args:
        return None
    parts = []
    for part in map(exact_rational, node.args):
        if part is None:
            return None
        parts.append(part)
    value = _exact_operation(node, parts)
    return value if value is not None and _num_bits(value) <= MAX_EXACT_BITS else None


def _exact_operation(node: sympy.Expr, parts: list[Fraction]) -> Fraction | None:
    name = type(node).__name__
    if isinstance(node, sympy.Add):
        return sum(parts, Fraction(0))
    if isinstance(node, sympy.Mul):
        return math.prod(parts, start=Fraction(1))
    if isinstance(node, sympy.Pow):
        base, exponent = parts
        if exponent.denominator != 1 or (base == 0 and exponent <= 0):
            return None
        return base ** int(exponent) if abs(exponent) * _num_bits(base) <= MAX_EXACT_BITS else None
    if name == "UnevaluatedExpr":
        return parts[0]
    if any(part.denominator != 1 or not 0 <= part <= MAX_FACTORIAL for part in parts):
        return None
    if name == "factorial":
        return Fraction(math.factorial(int(parts[0])))
    if name == "binomial":
        return Fraction(math.comb(*map(int, parts)))
    return None


def _num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _evaluate_node(node: sympy.Basic, values: Mapping[str, Any]) -> Any:
    if isinstance(node, sympy.Symbol):
        if node.name not in values:
            raise NotNumeric(node.name)
        return values[node.name]
    if isinstance(node, sympy.Rational):
        return mpmath.mpf(int(node.p)) / int(node.q)
    if isinstance(node, sympy.Float):
        return mpmath.mpf(node._mpf_)
    if node in CONSTANTS:
        return +CONSTANTS[node]()
    if not isinstance(node, sympy.Expr) or not node.args:
        raise NotNumeric(type(node).__name__)
    value = _apply_operation(node, [_evaluate_node(part, values) for part in node.args])
    if not mpmath.isfinite(value) or (value != 0 and abs(mpmath.mag(value)) > MAX_BITS):
        raise OutOfRange("a number")
    return value


def _apply_operation(node: sympy.Expr, parts: list[Any]) -> Any:
    name = type(node).__name__
    if isinstance(node, sympy.Add):
        return mpmath.fsum(parts)
    if isinstance(node, sympy.Mul):
        return mpmath.fprod(parts)
    if isinstance(node, sympy.Pow):
        return _take_power(*parts)
    if isinstance(node, sympy.exp):
        return _take_power(+mpmath.e, parts[0])
    if name in ("sinh", "cosh"):
        growing, shrinking = _take_power(+mpmath.e, parts[0]), _take_power(+mpmath.e, -parts[0])
        return (growing - shrinking if name == "sinh" else growing + shrinking) / 2
    if isinstance(node, sympy.log):
        logarithms = [mpmath.log(part) for part in parts]
        return logarithms[0] if len(parts) == 1 else logarithms[0] / logarithms[1]
    if name in ("factorial", "gamma", "binomial"):
        if any(abs(part) > MAX_FACTORIAL for part in parts):
            raise OutOfRange(name)
        return getattr(mpmath, name)(*parts)
    if isinstance(node, AppliedUndef):
        seed = name + "".join(mpmath.nstr(mpmath.mpc(part), 12) for part in parts)
        return mpmath.mpf(random.Random(seed).uniform(1, 2))
    if name == "UnevaluatedExpr":
        return parts[0]
    if name not in MPMATH_FUNCTIONS or len(parts) != 1:
        raise NotNumeric(name)
    if name in PERIODIC and mpmath.mag(parts[0]) > MAX_ANGLE_BITS:
        raise OutOfRange(name)
    return MPMATH_FUNCTIONS[name](parts[0])


def _take_power(base: Any, exponent: Any) -> Any:
    if base == 0:
        if mpmath.re(exponent) <= 0 and exponent != 0:
            raise OutOfRange("a power of zero")
        return mpmath.mpf(int(exponent == 0))
    if abs(exponent) * abs(mpmath.log(base, 2)) > MAX_BITS:
        raise OutOfRange("a power")
    return mpmath.power(base, exponent)


CONVERSION = ConversionConfig(lowercase_symbols=False)
POINT_MAGNITUDES = (1.0, 4.0)
"""Magnitudes of the symbols at a point."""
BRANCH_POINT_MAGNITUDES = ((4.0, 40.0), (40.0, 4_000.0), (0.01, 1.0))
"""Further ones for expressions with branches, so that |x - 5| is not 5 - x."""
BRANCHES = (sympy.Abs, sympy.Max, sympy.Min, sympy.sign)
CACHE_SIZE = 2_048
VALUE_KINDS = (sympy.Set, sympy.MatrixBase, sympy.Expr, sympy.Basic)
# Of 120 digits. When fifteen decided, `20! + 1` was taken for `20!`.
EXACT_ERROR = mpmath.mpf("1e-80")
# As `number.ROUNDING_PLACES`: a decimal may be rounded.
FLOAT_ERROR = 1e-6
VAGUE = re.compile(r"\\(?:approx|sim|simeq|cong|equiv|neq?|to|mid)(?![A-Za-z])")
NUMBER_BASE = re.compile(r"\d\s*_")
# `13 13` is parsed as 26 and `1 000` as 0.
SPLIT_NUMBER = re.compile(r"[\d.]\s+[\d.]|\d\.\s|\.\d+\.")

# math-verify warns, once per process, that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def same_expression(expected: str, answer: str) -> bool:
    """Whether two spelled expressions are equal for all values of their symbols.

    A text that cannot be parsed equals nothing. Time and memory are limited by the worker only."""
    if expected.count("'") != answer.count("'"):
        return False
    if NUMBER_BASE.search(expected) or NUMBER_BASE.search(
        answer
    ):  # the parser drops the base of 12_7
        return re.sub(r"[\s{}]", "", expected) == re.sub(r"[\s{}]", "", answer)
    left, right = read_expression(expected), read_expression(answer)
    if left is None or right is None or VAGUE.search(answer):
        return False
    # Symbols that the truth does not have may cancel, as `one of` in `one of 12 \cdot 0 + 13`.
    names, answer_names = ({symbol.name for symbol in side.free_symbols} for side in (left, right))
    if not answer_names <= names | {"i"}:
        return False
    return same_value(left, right, seed=expected + answer)


def same_value(left: sympy.Basic, right: sympy.Basic, *, seed: str) -> bool:
    """Whether two sympy objects are equal: identical, or equal at random points, or by verify.

    Args:
        left: one object.
        right: the other.
        seed: a text that selects the points. It is not computed from the objects: sympy may
            evaluate one in order to print it."""
    if left.has(sympy.nan, sympy.zoo) or right.has(sympy.nan, sympy.zoo):
        return False
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        if left == right:
            return True
        exact_values = exact_rational(left), exact_rational(right)
        if None not in exact_values:
            return exact_values[0] == exact_values[1]
        if (verdict := _same_at_points(left, right, seed)) is not None:
            return verdict
    # verify would compare a set with a number, and an equation with its right side.
    if any(isinstance(left, kind) != isinstance(right, kind) for kind in VALUE_KINDS):
        return False
    # The truth comes first: verify is not symmetric, and accepts 1 as the truth of `2x + z = 1`.
    return verify(left, right, timeout_seconds=None)


@functools.lru_cache(maxsize=CACHE_SIZE)
def read_expression(text: str) -> sympy.Basic | None:
    """Parse `text` as sympy, not evaluated; None where latex2sympy cannot."""
    text = re.sub(r"\\?%", "/100", text)
    if SPLIT_NUMBER.search(text):
        return None
    try:
        expression = latex2sympy(
            text, is_real=True, normalization_config=None, conversion_config=CONVERSION
        )
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the parser raises bare Exceptions, and sympy anything
        return None
    return expression if isinstance(expression, sympy.Basic | sympy.MatrixBase) else None


def constant_value(text: str) -> mpmath.mpc | None:
    """Return the value of a spelled expression without symbols; None for any other."""
    expression = read_expression(text)
    try:
        return None if expression is None else evaluate_expression(expression)
    except (NotNumeric, OutOfRange):
        return None


def _same_at_points(left: sympy.Expr, right: sympy.Expr, seed: str) -> bool | None:
    """Whether both are equal at random real points; None for an unknown function.

    Different values prove a difference without `simplify`, which may never return. Equal values to
    eighty digits, at points that a response cannot foresee, are taken as proof of equality."""
    names = sorted({symbol.name for symbol in left.free_symbols | right.free_symbols})
    is_float = left.has(sympy.Float) or right.has(sympy.Float)
    rng = random.Random(seed)
    num_compared = 0
    for values in _sample_points(
        names, rng, has_far_points=_has_branches(left) or _has_branches(right)
    ):
        try:
            pair = [evaluate_expression(side, values) for side in (left, right)]
        except NotNumeric:
            return None
        except OutOfRange:
            continue
        if not _are_close(*pair, is_float=is_float, is_constant=not names):
            return False
        num_compared += 1
    # At one sign of a symbol both may be undefined, or too large.
    return num_compared > 0


def _sample_points(
    names: list[str], rng: random.Random, has_far_points: bool
) -> Iterator[dict[str, Any]]:
    """Yield values of the symbols, in combinations of signs.

    One symbol has both signs, and of each two there are points where they have the same sign and
    points where they have different ones.

    Several are never negative together: sqrt(xy) is written for sqrt(x) sqrt(y)."""
    count = len(names)
    patterns = [[1] * count, [-1] * count, [1] * count]
    if count > 1:
        bits = range((count - 1).bit_length())
        codes = [[(-1) ** (index >> bit & 1) for index in range(count)] for bit in bits]
        patterns = [[1] * count, *codes, *([-sign for sign in code] for code in codes)]
    for scale in range(1 + len(BRANCH_POINT_MAGNITUDES) if has_far_points else 1):
        for signs in patterns if names else [[]]:
            values: dict[str, Any] = {}
            for index, (name, sign) in enumerate(zip(names, signs, strict=True)):
                # The decades change from symbol to symbol, too.
                low, high = (
                    BRANCH_POINT_MAGNITUDES[(scale + index) % len(BRANCH_POINT_MAGNITUDES)]
                    if scale
                    else POINT_MAGNITUDES
                )
                values[name] = mpmath.mpf(sign * rng.uniform(low, high))
            if "i" in values:
                values["i"] = mpmath.mpc(0, 1)
            yield values


def _has_branches(expression: sympy.Expr) -> bool:
    """Return whether absolute values or roots may make it another formula elsewhere."""
    powers = expression.atoms(sympy.Pow)
    has_roots = any(power.base.free_symbols and not power.exp.is_integer for power in powers)
    return has_roots or expression.has(*BRANCHES)


def _are_close(left: mpmath.mpc, right: mpmath.mpc, *, is_float: bool, is_constant: bool) -> bool:
    if is_float and is_constant and left.imag == right.imag == 0:
        return rounds_to_same(*(Fraction(mpmath.nstr(side.real, 20)) for side in (left, right)))
    size = max(abs(left), abs(right))
    return bool(abs(left - right) <= (FLOAT_ERROR if is_float else EXACT_ERROR) * size)


# The parser builds its tables while it parses, 0.1 s and more for each new kind of expression. Done
# here, that counts as import, and not against the time limit of the first responses.
for _example in (
    r"\frac{x+1}{2} - 3.5 \cdot \sqrt{x^{2}}",
    r"2 \pi r^{2} y + (x + 1)(x - 1)^{3}",
    r"\sin(2 x) + \ln 2 + e^{i \pi} + \log_{2} 8",
    r"x^{2} + y^{2} = 1",
    r"1 < x_{1} \leq 2",
    r"[0, 1) \cup \{2, 3\} \cup (-\infty, \frac{1}{2}]",
    r"\mathbb{R} \setminus \{2\}",
):
    read_expression(_example)
