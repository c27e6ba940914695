"""Writes out numbers with a word or coins: `1.5 million`, `4 dollars and 50 cents`."""

import re
from fractions import Fraction

NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,30}(?:\.\d{1,30})?"
SCALES = {
    **{"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12},
    **{"万": 4, "亿": 8},
}
SCALE = r"(?P<scale>(?:hundred|thousand|million|billion|trillion)(?![A-Za-z-])|万|亿)"
SCALED = re.compile(rf"(?<![\w.,])(?P<number>{NUMBER})\s*{SCALE}", re.IGNORECASE)
CENTS = re.compile(
    r"(?<![\w.,$])\\?\$?\s*(?P<whole>\d{1,9})\s*(?:dollars?|euros?)?\s+and\s+(?P<cents>\d{1,2})"
    r"\s*cents?\b",
    re.IGNORECASE,
)


def scaled(number: str, scale: str) -> int | None:
    """Return a number times the power of ten that a word names; None for one that is not whole."""
    value = Fraction(number.replace(",", "")) * 10 ** SCALES[scale.lower()]
    return value.numerator if value.denominator == 1 else None


def with_scales(text: str) -> str:
    """Return a text with such numbers in digits: `it costs 4.50`."""
    text = CENTS.sub(lambda match: f"{match['whole']}.{int(match['cents']):02}", text)
    return SCALED.sub(_digits, text)


def _digits(match: re.Match[str]) -> str:
    value = scaled(match["number"], match["scale"])
    return match[0] if value is None else f"{value} " if match["scale"] in "万亿" else str(value)
