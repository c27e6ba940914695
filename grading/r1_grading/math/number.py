"""Written numbers, and the lists that they stand in, read exactly and without a parser.

Most answers of a run are such numbers, and this is some hundred times faster than a computer
algebra system. It also defines the meaning of percentages, mixed numbers and thousands separators.
The outer structure of an answer is brackets, lists and matrices. Comparing member by member,
instead of as sympy sets, distinguishes an ordered pair from a set, counts every candidate that an
answer lists, and makes a large matrix cheap."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LATEX_TOKEN = re.compile(
    r"\\\\|\\[{}]|\\[A-Za-z]+|[()\[\]{}]|[,;&=<>|]|\b(?:or|and)\b|[^\\,;&=<>|()\[\]{}oa]+|.",
    re.DOTALL,
)
OPENING = frozenset(("(", "[", "{", r"\{", r"\langle"))
CLOSING = frozenset((")", "]", "}", r"\}", r"\rangle"))
SEPARATORS = frozenset((",", ";", "or", "and"))
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
WITH_THOUSANDS = re.compile(r"(?<![\d,.(\[{])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
# `(1,200)` is a point or an interval; `(1,000)` may be a number in brackets.
PAIR = re.compile(r"(?:[(\[]|\\\{)\s*[-+]?\d{1,3}(?:,(?!000)\d{3})+\s*(?:[)\]]|\\\})")
# No list has the member 000 or 050, so `1,000` is a number; `1,200` may be either.
ROUND_THOUSANDS = re.compile(r"(?<![\d,])[1-9]\d{0,2}(?:,\d{3})*,0\d\d(?!\d)")
MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
PLUS_MINUS, MINUS_PLUS = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
SETS = frozenset((r"\{\}", "{}"))


@dataclass(frozen=True)
class Structure:
    """The outer structure of an answer.

    Attributes:
        brackets: "" for a bare list, else a pair such as "[)" or "()".
        members: the texts between them."""

    brackets: str
    members: tuple[str, ...]

    @property
    def is_set(self) -> bool:
        """Whether the brackets are those of a set, where the order does not count."""
        return self.brackets in SETS


def without_thousands(text: str) -> str:
    """Return `text` without the commas between thousands, unless they may separate a pair."""
    if PAIR.search(text):
        return text
    return WITH_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def nesting_depth(text: str) -> int | None:
    """Return how deep brackets are nested in `text`; None where they do not close."""
    depths = [0, *_bracket_depths(LATEX_TOKEN.findall(text))]
    return max(depths) if depths[-1] == 0 and min(depths) == 0 else None


def split_top_level(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """Split `text` at separators outside all brackets into (part, separator after it)."""
    parts: list[tuple[str, str]] = []
    part_tokens: list[str] = []
    tokens = LATEX_TOKEN.findall(text)
    for token, depth in zip(tokens, _bracket_depths(tokens), strict=True):
        if depth == 0 and token in separators:
            parts.append(("".join(part_tokens).strip(), token))
            part_tokens = []
        else:
            part_tokens.append(token)
    return [*parts, ("".join(part_tokens).strip(), "")]


def read_structure(text: str) -> Structure | None:
    """Read `text` as a list, set, tuple or interval; None for a single value.

    `1, 2` and `1 or 2` are bare lists; "1,2 and 3" and "1, 2, and 3" have three members."""
    brackets, content = _split_brackets(text)
    # Where a space follows the commas of a list, commas without one may separate thousands.
    if re.search(r",\s", content) or ROUND_THOUSANDS.search(content):
        content = THOUSANDS.sub("", content)
    parts = [part for part, _ in split_top_level(content, SEPARATORS)]
    members = tuple(part for part in parts if part)
    if not brackets or brackets in SETS:
        if not PLUS_MINUS.search(content):  # alone, \mp is \pm in another order
            members = tuple(MINUS_PLUS.sub(r"\\pm", part) for part in members)
        members = tuple(sign for part in members for sign in _both_signs(part))
    if brackets in SETS or len(members) > 1:
        return Structure(brackets, members)
    return None


def read_matrix(text: str) -> list[list[str]] | None:
    """Return the cells of a `matrix`, `pmatrix`, `bmatrix` or `[[1, 2], [3, 4]]`.

    None for any other text."""
    brackets, content = _split_brackets(text)
    if brackets == "[]" and r"\begin" not in content:
        lists = [read_structure(part) for part, _ in split_top_level(content, SEPARATORS)]
        if all(row is not None and row.brackets == "[]" for row in lists):
            return [list(row.members) for row in lists if row is not None]
    match = MATRIX.fullmatch(content if brackets in ("()", "[]") else text.strip())
    if match is None or r"\begin" in match[2]:
        return None
    rows = match[2].strip().removesuffix(r"\\").split(r"\\")
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def match_all(left: Sequence[Any], right: Sequence[Any], is_equal: Callable[..., bool]) -> bool:
    """Whether each item of `left` is the same as another one of `right`, in any order.

    Args:
        left: the items of one side.
        right: those of the other.
        is_equal: compares two items."""
    candidates = list(right)
    for item in left:
        match = next((candidate for candidate in candidates if is_equal(item, candidate)), None)
        if match is None:
            return False
        candidates.remove(match)
    return not candidates


def _both_signs(member: str) -> tuple[str, ...]:
    r"""Return both values of `3 \pm \sqrt{2}`, or the member itself without a `\pm`."""
    if not PLUS_MINUS.search(member):
        return (member,)
    plus = MINUS_PLUS.sub("-", PLUS_MINUS.sub("+", member))
    minus = MINUS_PLUS.sub("+", PLUS_MINUS.sub("-", member))
    return plus, minus


def _split_brackets(text: str) -> tuple[str, str]:
    """Return the brackets around all of `text` ("" if there are none) and the text inside."""
    tokens = LATEX_TOKEN.findall(text.strip())
    if len(tokens) < 2 or tokens[0] not in OPENING or tokens[-1] not in CLOSING:
        return "", text.strip()
    if 0 in _bracket_depths(tokens)[:-1]:
        return "", text.strip()
    return tokens[0] + tokens[-1], "".join(tokens[1:-1]).strip()


def _bracket_depths(tokens: list[str]) -> list[int]:
    """Return in how many brackets each token stands; a closing one counts as outside its own."""
    return list(itertools.accumulate((t in OPENING) - (t in CLOSING) for t in tokens))


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
