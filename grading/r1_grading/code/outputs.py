"""Compares what a program printed or returned with what a test expects."""

import re
from fractions import Fraction
from itertools import zip_longest
from typing import Any

from r1_grading.base.values import load_json

NUMBER_BYTES = re.compile(rb"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
MAX_NUMBER_BYTES = 4_000
FLOAT = re.compile(rb"\.|[eE]-")
"""What a number has that is no integer: a point, or a negative exponent."""
FLOAT_TOLERANCE = 1e-6
"""The tolerance of floats where a problem has none: the usual one of statements that ask for an
absolute or relative error. The harnesses of APPS, TACO and verl's `prime_code` accept 1e-5 (numpy's
allclose), LiveCodeBench's demands equal values."""


def same_output(
    actual: bytes, expected: str, tolerance: float | None, *, by_value: bool = False
) -> bool:
    """Whether all lines have the same tokens (split at white space), blank lines at the ends aside.

    Args:
        actual: what the program printed.
        expected: the test's output.
        tolerance: two tokens that are decimal numbers may differ by tolerance × max(1, |expected|),
            so that 0 accepts 1.0 for 1. None: `FLOAT_TOLERANCE` where the expected token is a
            float; others are compared as text, or with `by_value` as numbers.
        by_value: whether, without a tolerance, other decimal numbers are compared as numbers."""
    texts = actual, expected.encode("utf-8", "replace")
    left, right = (text.strip().split(b"\n") for text in texts)
    return len(left) == len(right) and all(
        a == b
        or all(
            _same_tokens(*pair, tolerance, by_value) for pair in zip_longest(a.split(), b.split())
        )
        for a, b in zip(left, right, strict=True)
    )


def same_result(actual: bytes, expected: Any, tolerance: float | None) -> bool:
    """Whether `actual`, JSON text, is the JSON value `expected`, compared as Python compares.

    So 1 == 1.0 == True, and NaN equals nothing; a tuple is a list in JSON.

    Args:
        actual: the function's result as JSON text.
        expected: the test's result.
        tolerance: as in `same_output`, for every number; None: `FLOAT_TOLERANCE` where a float is
            expected."""
    try:
        return _same_values(load_json(actual), expected, tolerance)
    except (ValueError, RecursionError, OverflowError):
        return False


def _same_tokens(
    actual: bytes | None, expected: bytes | None, tolerance: float | None, by_value: bool
) -> bool:
    if actual == expected or actual is None or expected is None:
        return actual == expected
    if tolerance is None:
        is_float = FLOAT.search(expected) is not None
        if not (is_float or by_value):
            return False
        tolerance = FLOAT_TOLERANCE if is_float else 0.0
    if max(len(actual), len(expected)) > MAX_NUMBER_BYTES:
        return False
    if not (NUMBER_BYTES.fullmatch(actual) and NUMBER_BYTES.fullmatch(expected)):
        return False
    # Exactly: as floats, 2**53 and 2**53 + 1 would be equal, and 1e999 infinite.
    value, target = Fraction(actual.decode()), Fraction(expected.decode())
    return abs(value - target) <= Fraction(str(tolerance)) * max(Fraction(1), abs(target))


def _same_values(actual: Any, expected: Any, tolerance: float | None) -> bool:
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            return False
        return all(_same_values(actual[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return False
        return all(_same_values(a, b, tolerance) for a, b in zip(actual, expected, strict=True))
    if actual == expected:
        return True
    if not all(isinstance(v, int | float) for v in (actual, expected)):
        return False
    if tolerance is None:
        tolerance = FLOAT_TOLERANCE if isinstance(expected, float) else 0.0
    # Exactly, as above; NaN and infinity have no fraction, and are not near anything.
    margin = Fraction(str(tolerance)) * max(Fraction(1), abs(Fraction(expected)))
    return abs(Fraction(actual) - Fraction(expected)) <= margin
