r"""Written numbers, read and compared exactly, without a parser or floating point.

Most answers of a run are such numbers, and this is some hundred times faster than a computer
algebra system. It also defines the meaning of percentages, mixed numbers and thousands separators.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_r1.rewards.math.structure import PAIR

INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,400})"
DECIMAL = rf"(?:{INTEGER}(?:\.\d{{0,400}})?|\.\d{{1,400}})"
SCALE = (
    r"(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{\s*(?P<power>[+-]?\d{1,3})\s*\}"
    r"|[eE](?P<e>[+-]?\d{1,3}))"
)
SIGN = r"(?P<sign>[+-]?)\s*"
FORMS = [
    re.compile(pattern)
    for pattern in (
        rf"{SIGN}(?P<decimal>{DECIMAL}){SCALE}?",
        rf"{SIGN}10\s*\^\s*\{{\s*(?P<power>[+-]?\d{{1,3}})\s*\}}",
        rf"{SIGN}(?P<whole>\d{{1,20}})\s*\\frac\s*\{{\s*(?P<top>\d{{1,20}})\s*\}}\s*\{{\s*(?P<bottom>\d{{1,20}})\s*\}}",
        rf"{SIGN}(?P<whole>\d{{1,20}})\s+(?P<top>\d{{1,20}})\s*/\s*(?P<bottom>\d{{1,20}})",
        rf"{SIGN}\\frac\s*\{{\s*(?P<top>[+-]?\s*{DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>[+-]?\s*{DECIMAL})\s*\}}",
        rf"{SIGN}(?P<top>{DECIMAL})\s*/\s*(?P<bottom>[+-]?{DECIMAL})",
        rf"{SIGN}(?P<decimal>\d{{1,20}}\.\d{{0,20}})\\overline\s*\{{(?P<period>\d{{1,20}})\}}",
    )
]
PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:percent|per cent)\s*\}|percent|per cent|pct)$")
WRAPPED = re.compile(r"([+-]?)\s*(?:\(([^()]*)\)|\[([^\[\]]*)\])")
"""Brackets that do not change the value: `-(1/2)` and `(-3)/4`."""
WRAPPED_TWICE = re.compile(r"\(\s*(\([^()]*\))\s*\)")
MAX_WRAPS = 4
WRAPPED_PART = re.compile(r"(?:^|(?<=[/{]))\(\s*([+-]?[\d.]+)\s*\)(?=[/}]|$)")
ROUNDING_PLACES = 6
"""A decimal may stand for a number that equals it to six places, as in math-verify …"""
MAX_RELATIVE_ERROR = Fraction(1, 1000)
"""… but 0.0000001 is not 0.0000002, although both are 0 to six places."""


@dataclass(frozen=True)
class WrittenNumber:
    """A written number.

    value: exact, without the percent sign. is_decimal: it may have been rounded. is_quotient: a
    division left open, `24/2` or `1.5/2`, and not a fraction."""

    value: Fraction
    is_decimal: bool = False
    is_percent: bool = False
    is_quotient: bool = False


def read_number(text: str) -> WrittenNumber | None:
    """Read the number that `text` (spelled by `spelling.spell`) writes out.

    None for any other text, and for a fraction over zero."""
    if not text.isascii():  # \d matches the digits of all scripts
        return None
    text = text.strip()
    bare = PERCENT.sub("", text)
    is_percent = bare != text
    for _ in range(MAX_WRAPS):
        bare = WRAPPED_TWICE.sub(r"\1", bare)
    if PAIR.search(bare):  # its comma may separate two numbers, not thousands
        return None
    while (match := WRAPPED.fullmatch(bare)) is not None:
        bare = match[1] + (match[2] or match[3] or "").strip()
    bare = WRAPPED_PART.sub(r"\1", bare)
    for form in FORMS:
        if (match := form.fullmatch(bare)) is not None:
            break
    else:
        return None
    try:
        value, is_decimal = _value(match.groupdict())
    except ZeroDivisionError:
        return None
    is_quotient = bool(match.groupdict().get("bottom")) and (is_decimal or value.denominator == 1)
    value = -value if match["sign"] == "-" else value
    return WrittenNumber(value, is_decimal, is_percent, is_quotient)


def same_number(expected: WrittenNumber, answer: WrittenNumber) -> bool:
    """Whether both are the same number: equal, or equal to six places where one is a decimal.

    A percent sign only in the answer has one meaning for each truth: a truth up to 1 is a
    proportion, and the sign a hundredth (1/2 and 50%); a larger truth is a percentage without its
    sign (60 and 60%, as in GSM8K). Where only the truth has a sign, the answer may be the hundredth
    or, above 1, the number without the sign."""
    if expected.is_percent == answer.is_percent:
        return _close(expected.value, answer.value, expected, answer)
    if expected.is_percent:
        if _close(expected.value / 100, answer.value, expected, answer):
            return True
        return abs(expected.value) > 1 and _close(expected.value, answer.value, expected, answer)
    scale = 100 if abs(expected.value) <= 1 else 1
    return _close(expected.value, answer.value / scale, expected, answer)


def rounds_to_same(left: Fraction, right: Fraction) -> bool:
    """Whether both are equal to six decimal places and to a thousandth of their size."""
    if round(left, ROUNDING_PLACES) != round(right, ROUNDING_PLACES):
        return False
    return abs(left - right) <= MAX_RELATIVE_ERROR * max(abs(left), abs(right))


def _close(left: Fraction, right: Fraction, expected: WrittenNumber, answer: WrittenNumber) -> bool:
    if left == right:
        return True
    return (expected.is_decimal or answer.is_decimal) and rounds_to_same(left, right)


def _value(groups: dict[str, str | None]) -> tuple[Fraction, bool]:
    parts = {name: text for name, text in groups.items() if text}
    if "period" in parts:
        return _repeating(parts["decimal"], parts["period"]), False
    if "bottom" in parts:
        value = _fraction(parts["top"]) / _fraction(parts["bottom"])
        is_decimal = "." in parts["top"] + parts["bottom"]
        return value + int(parts.get("whole", 0)), is_decimal
    digits = parts.get("decimal", "1")
    power = parts.get("power") or parts.get("e")
    scale = Fraction(10) ** int(power) if power else Fraction(1)
    return _fraction(digits) * scale, "." in digits


def _fraction(digits: str) -> Fraction:
    plain = digits.replace(",", "").replace(" ", "")
    return Fraction(plain + "0" if plain.endswith(".") else plain)


def _repeating(start: str, period: str) -> Fraction:
    whole, _, decimals = start.partition(".")
    nines = (10 ** len(period) - 1) * 10 ** len(decimals)
    return Fraction(int(whole + decimals), 10 ** len(decimals)) + Fraction(int(period), nines)
