"""Written numbers, read exactly and without a parser.

Most answers of a run are such numbers, and this is some hundred times faster than a computer
algebra system. It also defines the meaning of percentages, mixed numbers and thousands
separators."""

import re
from dataclasses import dataclass
from fractions import Fraction

from r1_grading.math.answer_structure import PAIR

INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,400})"
DECIMAL_PATTERN = rf"(?:{INTEGER}(?:\.\d{{0,400}})?|\.\d{{1,400}})"
POWER_OF_TEN = (
    r"(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{\s*(?P<power>[+-]?\d{1,3})\s*\}"
    r"|[eE](?P<e>[+-]?\d{1,3}))"
)
SIGN = r"(?P<sign>[+-]?)\s*"
NUMBER_FORMS = [
    re.compile(pattern)
    for pattern in (
        rf"{SIGN}(?P<decimal>{DECIMAL_PATTERN}){POWER_OF_TEN}?",
        rf"{SIGN}10\s*\^\s*\{{\s*(?P<power>[+-]?\d{{1,3}})\s*\}}",
        rf"{SIGN}(?P<whole>\d{{1,20}})\s*\\frac\s*\{{\s*(?P<top>\d{{1,20}})\s*\}}\s*\{{\s*(?P<bottom>\d{{1,20}})\s*\}}",
        rf"{SIGN}(?P<whole>\d{{1,20}})\s+(?P<top>\d{{1,20}})\s*/\s*(?P<bottom>\d{{1,20}})",
        rf"{SIGN}\\frac\s*\{{\s*(?P<top>[+-]?\s*{DECIMAL_PATTERN})\s*\}}\s*\{{\s*(?P<bottom>[+-]?\s*{DECIMAL_PATTERN})\s*\}}",
        rf"{SIGN}(?P<top>{DECIMAL_PATTERN})\s*/\s*(?P<bottom>[+-]?{DECIMAL_PATTERN})",
        rf"{SIGN}(?P<decimal>\d{{1,20}}\.\d{{0,20}})\\overline\s*\{{(?P<period>\d{{1,20}})\}}",
    )
]
PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:percent|per cent)\s*\}|percent|per cent|pct)$")
BRACKETED_NUMBER = re.compile(r"([+-]?)\s*(?:\(([^()]*)\)|\[([^\[\]]*)\])")
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

    Attributes:
        is_percent: whether a percent sign follows it.
        value: exact, without the percent sign.
        is_decimal: it may have been rounded.
        is_quotient: a division left open, `24/2` or `1.5/2`, and not a fraction."""

    value: Fraction
    is_decimal: bool = False
    is_percent: bool = False
    is_quotient: bool = False


def read_number(text: str) -> WrittenNumber | None:
    """Read the number that `text` (spelled by `normalization.normalize_latex`) writes out.

    None for any other text, and for a fraction over zero."""
    if not text.isascii():  # \d matches the digits of all scripts
        return None
    text = text.strip()
    number_text = PERCENT.sub("", text)
    is_percent = number_text != text
    for _ in range(MAX_WRAPS):
        number_text = WRAPPED_TWICE.sub(r"\1", number_text)
    if PAIR.search(number_text):  # its comma may separate two numbers, not thousands
        return None
    while (match := BRACKETED_NUMBER.fullmatch(number_text)) is not None:
        number_text = match[1] + (match[2] or match[3] or "").strip()
    number_text = WRAPPED_PART.sub(r"\1", number_text)
    for form in NUMBER_FORMS:
        if (match := form.fullmatch(number_text)) is not None:
            break
    else:
        return None
    try:
        value, is_decimal = _read_value(match.groupdict())
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
        return _is_close(expected.value, answer.value, expected, answer)
    if expected.is_percent:
        if _is_close(expected.value / 100, answer.value, expected, answer):
            return True
        return abs(expected.value) > 1 and _is_close(expected.value, answer.value, expected, answer)
    scale = 100 if abs(expected.value) <= 1 else 1
    return _is_close(expected.value, answer.value / scale, expected, answer)


def rounds_to_same(left: Fraction, right: Fraction) -> bool:
    """Whether both are equal to six decimal places and to a thousandth of their size."""
    if round(left, ROUNDING_PLACES) != round(right, ROUNDING_PLACES):
        return False
    return abs(left - right) <= MAX_RELATIVE_ERROR * max(abs(left), abs(right))


def _is_close(
    left: Fraction, right: Fraction, expected: WrittenNumber, answer: WrittenNumber
) -> bool:
    if left == right:
        return True
    return (expected.is_decimal or answer.is_decimal) and rounds_to_same(left, right)


def _read_value(groups: dict[str, str | None]) -> tuple[Fraction, bool]:
    parts = {name: text for name, text in groups.items() if text}
    if "period" in parts:
        return _repeating_decimal(parts["decimal"], parts["period"]), False
    if "bottom" in parts:
        value = _digits_to_fraction(parts["top"]) / _digits_to_fraction(parts["bottom"])
        is_decimal = "." in parts["top"] + parts["bottom"]
        return value + int(parts.get("whole", 0)), is_decimal
    digits = parts.get("decimal", "1")
    power = parts.get("power") or parts.get("e")
    scale = Fraction(10) ** int(power) if power else Fraction(1)
    return _digits_to_fraction(digits) * scale, "." in digits


def _digits_to_fraction(digits: str) -> Fraction:
    number = digits.replace(",", "").replace(" ", "")
    return Fraction(number + "0" if number.endswith(".") else number)


def _repeating_decimal(start: str, period: str) -> Fraction:
    integer, _, decimals = start.partition(".")
    nines = (10 ** len(period) - 1) * 10 ** len(decimals)
    return Fraction(int(integer + decimals), 10 ** len(decimals)) + Fraction(int(period), nines)
