"""Compare the output of a program with the expected one, outside the sandbox."""

import json
import re
from itertools import zip_longest
from typing import Any

NUMBER = re.compile(rb"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
MAX_NUMBER_BYTES = 400


def equal_output(actual: bytes, expected: str, tolerance: float | None) -> bool:
    """Whether all lines have the same tokens (split at white space), trailing blank lines aside.

    tolerance: two tokens that are decimal numbers may differ by tolerance × max(1, |expected|), so
    that 0 accepts 1.0 for 1; None: tokens are compared as text.
    """
    lines = _lines(actual), _lines(expected.encode("utf-8", "replace"))
    if len(lines[0]) != len(lines[1]):
        return False
    return all(_equal_lines(*pair, tolerance) for pair in zip(*lines, strict=True))


def equal_result(actual: bytes, expected: Any, tolerance: float | None) -> bool:
    """Whether `actual`, JSON text, is the JSON value `expected`, compared as Python compares.

    So 1 == 1.0 == True, and NaN equals nothing; a tuple is a list in JSON. tolerance: as in
    `equal_output`, for every number.
    """
    try:
        value = json.loads(actual)
        return _equal_values(value, expected, tolerance)
    except (ValueError, RecursionError, OverflowError):
        return False


def _lines(text: bytes) -> list[bytes]:
    return text.rstrip().split(b"\n")


def _equal_lines(actual: bytes, expected: bytes, tolerance: float | None) -> bool:
    if actual == expected:
        return True
    pairs = zip_longest(actual.split(), expected.split())
    return all(a == b or _equal_tokens(a, b, tolerance) for a, b in pairs)


def _equal_tokens(actual: bytes | None, expected: bytes | None, tolerance: float | None) -> bool:
    if tolerance is None or actual is None or expected is None:
        return False
    if max(len(actual), len(expected)) > MAX_NUMBER_BYTES:
        return False
    if not (NUMBER.fullmatch(actual) and NUMBER.fullmatch(expected)):
        return False
    return _close(float(actual), float(expected), tolerance)


def _equal_values(actual: Any, expected: Any, tolerance: float | None) -> bool:
    if isinstance(expected, list):
        return (
            isinstance(actual, list)
            and len(actual) == len(expected)
            and all(_equal_values(a, b, tolerance) for a, b in zip(actual, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and actual.keys() == expected.keys()
            and all(_equal_values(actual[key], expected[key], tolerance) for key in expected)
        )
    if actual == expected:
        return True
    if tolerance is None or not all(isinstance(v, int | float) for v in (actual, expected)):
        return False
    return _close(float(actual), float(expected), tolerance)


def _close(actual: float, expected: float, tolerance: float) -> bool:
    # An infinite difference is never within an infinite margin.
    return abs(actual - expected) <= min(tolerance * max(1.0, abs(expected)), 1e300)
