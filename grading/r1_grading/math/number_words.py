"""Amounts and numbers in English words, written as numbers.

Amounts are `1.5 million`, `18 dollars and 50 cents`, `1 out of 4`. Only a text that is such an
amount as a whole is rewritten, truth and answer alike, so that each has one meaning: 5 million is
5,000,000 and never 5."""

import re

from r1_grading.reading.context import DENIAL
from r1_grading.reading.scaled_numbers import CENTS, NUMBER, SCALE_WORD, apply_scale

MAX_CHARS = 200
SCALED_AMOUNT = re.compile(
    rf"(?P<sign>[-−]?\s*\\?\$?\s*)(?P<number>{NUMBER})\s*(?:\\text\s*\{{\s*)?{SCALE_WORD}\s*"
    r"(?P<unit>[A-Za-z ]*)\}?",
    re.IGNORECASE,
)
RATIO = re.compile(r"(?P<part>\d{1,9})\s+(?:out\s+of|in)\s+(?P<whole>\d{1,9})", re.IGNORECASE)
CHANCE = re.compile(
    r"(?:an?\s+)?(?P<value>.*?(?:%|\bpercent|\\frac\{\d+\}\{\d+\}|\d/\d+))\s+"
    r"(?:chance|probability|likelihood)",
    re.IGNORECASE,
)
EXPLAINED = re.compile(
    r"(?P<value>[^()]*[^()\s])\s+\((?P<why>(?:since|because)\s[^()]*(?:\([^()]*\)[^()]*)*)\)",
    re.IGNORECASE,
)
IN_BRACKETS = re.compile(
    rf"(?P<value>[-−]?(?:{NUMBER}))\s+\((?P<unit>[a-z]{{2,20}}(?: [a-z]{{2,20}}){{0,2}})\)"
)
TIME_UNITS = {
    **dict.fromkeys(("day", "days"), "day"),
    **dict.fromkeys(("hour", "hours", "hr", "hrs", "h"), "hour"),
    **dict.fromkeys(("minute", "minutes", "min", "mins"), "minute"),
    **dict.fromkeys(("second", "seconds", "sec", "secs", "s"), "second"),
    **dict.fromkeys(("foot", "feet", "ft", "'"), "foot"),
    **dict.fromkeys(("inch", "inches", "in", '"'), "inch"),
    **dict.fromkeys(("pound", "pounds", "lb", "lbs"), "pound"),
    **dict.fromkeys(("ounce", "ounces", "oz"), "ounce"),
}
"""Units of amounts in two or three parts, `5 feet 6 inches`."""
PART = rf"\d{{1,9}}\s*(?:{'|'.join(sorted(TIME_UNITS, key=len, reverse=True))})\.?"
COMPOUND = re.compile(rf"{PART}(?:\s*(?:,|,?\s*\band\b)?\s*{PART}){{1,2}}", re.IGNORECASE)
UNITS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
CARDINALS = {word: n for n, word in enumerate(UNITS.split())}
CARDINALS |= {word: 10 * n for n, word in enumerate(TENS.split(), start=2)}
MULTIPLES = {"thousand": 1000, "million": 10**6, "billion": 10**9}
NUMBER_WORDS = re.compile(r"[A-Za-z]+(?:[\s-]+[A-Za-z]+){0,20}")


def words_to_number(text: str) -> str:
    r"""Return an amount in words as a number, and the value of `7 (since 3 + 4 = 7)`.

    Any other text is unchanged."""
    if len(text) > MAX_CHARS or text.isdecimal():
        return text
    text = text.strip()
    if (match := EXPLAINED.fullmatch(text)) and not DENIAL.search(match["why"]):
        text = match["value"]
    if (match := CHANCE.fullmatch(text)) is not None:
        return match["value"]
    if (match := CENTS.fullmatch(text)) is not None:
        return rf"\${match['whole']}.{int(match['cents']):02}"
    if (match := IN_BRACKETS.fullmatch(text)) is not None:
        return f"{match['value']} {match['unit']}"
    if COMPOUND.fullmatch(text):
        parts = re.findall(r"(\d+)\s*([A-Za-z]+|['\"])", text)
        return " ".join(f"{int(number)} {TIME_UNITS[unit.lower()]}" for number, unit in parts)
    if (match := RATIO.fullmatch(text)) is not None:
        return rf"\frac{{{match['part']}}}{{{match['whole']}}}"
    if (match := SCALED_AMOUNT.fullmatch(text)) is not None:
        amount = apply_scale(match["number"], match["scale"])
        if amount is not None:
            return f"{match['sign']}{amount} {match['unit']}".strip()
    value = read_number_words(text)
    return text if value is None else str(value)


def read_number_words(text: str) -> int | None:
    """Return the number that English words write, `two hundred and five`; None for other text."""
    if not NUMBER_WORDS.fullmatch(text):
        return None
    words = re.split(r"[\s-]+", text.lower())
    words[0] = "one" if words[0] == "a" and len(words) > 1 else words[0]
    total = part = 0
    last_word = ""
    for index, word in enumerate(words):
        if word == "and" and 0 < index < len(words) - 1:
            continue
        if word == "hundred" and 0 < part < 10:
            part *= 100
        elif word in MULTIPLES and part and (not total or total % (1000 * MULTIPLES[word]) == 0):
            total, part = total + part * MULTIPLES[word], 0
        elif word in CARDINALS and _can_follow(part, CARDINALS[word], last_word):
            part += CARDINALS[word]
        else:
            return None
        last_word = word
    return total + part


def _can_follow(part: int, value: int, last: str) -> bool:
    """Return whether a number word may follow: `twenty one`, `hundred five`, but not `one two`."""
    if value == 0:
        return part == 0 and not last
    return part % 100 == 0 or (last in TENS.split() and value < 10)
