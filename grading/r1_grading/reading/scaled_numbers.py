"""Reads numbers with a word for a power of ten, `4.5 million` and `3万`, and dollars with cents."""

import re
from fractions import Fraction

NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,30}(?:\.\d{1,30})?"
SCALES = {
    **{"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12},
    **{"万": 4, "亿": 8},
}
SCALE_WORD = r"(?P<scale>(?:hundred|thousand|million|billion|trillion)(?![A-Za-z-])|万|亿)"
SCALED_NUMBER = re.compile(rf"(?<![\w.,])(?P<number>{NUMBER})\s*{SCALE_WORD}", re.IGNORECASE)
CENTS = re.compile(
    r"(?<![\w.,$])\\?\$?\s*(?P<whole>\d{1,9})\s*(?:dollars?|euros?)?\s+and\s+(?P<cents>\d{1,2})"
    r"\s*cents?\b",
    re.IGNORECASE,
)


def apply_scale(number: str, scale: str) -> int | None:
    """Return a number times the power of ten that a word names; None for one that is not whole."""
    value = Fraction(number.replace(",", "")) * 10 ** SCALES[scale.lower()]
    return value.numerator if value.denominator == 1 else None


def with_scales(text: str) -> str:
    """Return a text with these numbers in digits alone: `it costs 4.50`."""
    text = CENTS.sub(lambda match: f"{match['whole']}.{int(match['cents']):02}", text)
    return SCALED_NUMBER.sub(_write_out_scale, text)


def _write_out_scale(match: re.Match[str]) -> str:
    value = apply_scale(match["number"], match["scale"])
    return match[0] if value is None else f"{value} " if match["scale"] in "万亿" else str(value)
