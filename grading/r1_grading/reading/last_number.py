"""Reads the last number of a line as its answer.

It is refused where the text around it denies it, joins it to another number, or makes it a part of
an expression."""

import re

from r1_grading.base.errors import shorten
from r1_grading.reading.context import CHANGE_AFTER, DENIAL
from r1_grading.reading.tags_and_boxes import Extraction, make_extraction

# A number with commas between its thousands, or with a fraction after the whole.
DIGIT_GROUPS = r"(?:\d{1,3}(?:,\d{3})+|\d+(?: \d+(?=/\d))?)(?:\.\d+)?(?:/\d+)?"
LAST_NUMBER = re.compile(
    rf"(?<![\w.,:/^{{\\+*√∛∜-])[-+]?\$?(?P<number>[-+]?{DIGIT_GROUPS})"
    r"(?:\\?%)?(?![\w^{√∛∜⁻]|[.,:/]\d)"
)
"""A number that no letter, formula or longer number goes on from: not the 2 of x^2 or of 3.14.2."""
SPACED_THOUSANDS = re.compile(
    r"((?:^|[=:]|\b(?:is|are|equals)\b)[\s$*]{0,9}[-+]?\$?)(\d{1,3}(?: \d{3})+)"
    r"(?=(?:\.\d+)?[\s$*.!)]{0,9}$)|(?<![\d.,])(\d{1,3}(?: \d{3}){2,})(?![\d/])"
)
"""Spaces between the thousands of a number that is all that is stated, `The answer is 1 500.`, or
has several. In `On day 7 140 eggs hatch` there are two numbers."""
SIGN_TRANSLATION = str.maketrans({**dict.fromkeys("−–‐－", "-"), **dict.fromkeys("⁄∕", "/")})
"""Characters that are a minus sign or a fraction's bar."""
DASH = re.compile(
    r"(?:(?<=[A-Za-z]{2})(?<!\bis)(?<!equals)|(?<=[:)]))\s{0,9}–(?=\s{0,9}\$?\d)", re.IGNORECASE
)
"""An en dash that is no sign: `Answer –13`."""
SIGN_APART = re.compile(r"([=(])([\s$]{0,9}-)\s{1,9}(?=\$?\d)")
"""A minus sign with a space after it, `x = - 13`. One that begins a line is the mark of a list, and
one after words is a dash: `Final answer: - 13`."""
JOINED_NUMBERS = re.compile(
    r"\d[\s$)]{0,9}[,;(.]?[\s$]{0,9}(?:[,;&|~^/]|(?:or|and|to|vs\.?|versus|maybe|perhaps|possibly"
    r"|(?:or|but) (?:maybe|perhaps|possibly)|times|plus|minus)\b|[-+*×÷·⋅]"
    r"|\\(?:times|cdot|div)\b)[\s$(.]{0,9}$"
    # `12 13`, `12 remainder 5`, `2 dozen and 5`.
    r"|\d\$?\s[\s$]{0,9}$"
    r"|\d\s{0,9}(?:r|rem|remainder|(?:(?:and|with) )?an? remainder(?: of)?|with remainder)"
    r"\.?,?\s{0,9}$|\d\s{0,9}(?:dozens?|tens) and\s{0,9}$",
    re.IGNORECASE,
)
"""Text that joins the last number to an earlier one: two candidates (`12 or 13`), a calculation
that is not worked out and may be the question (`2 + 11`), or parts of one quantity."""
NUMBERED = re.compile(
    r"(?:\b(?:day|week|month|quarter|year|hour|minute|step|round|stage|phase|case|part|question"
    r"|problem|page|chapter|line|row|column|group|class|grade|level|team|game|trial|figure)"
    r"\s#?\d{1,9}|\bin \d{4}),?\s{1,9}$",
    re.IGNORECASE,
)
"""A number that tells which one, and joins no other: `On day 7, 140 eggs`, `In 2024, 140 eggs`."""
# Units from large to small: after a number of the first, one of a later is part of one quantity.
UNIT_NAMES = (
    "years? months? weeks? days? h|hrs?|hours? m|mins?|minutes? s|secs?|seconds?",
    "miles? yards?|yd feet|foot|ft|['′’] inch(?:es)?|in(?![\\s-]*[A-Za-z])|[\"″”]",
    "km|kilomet(?:er|re)s? m|met(?:er|re)s? cm|centimet(?:er|re)s? mm|millimet(?:er|re)s?",
    "tons?|tonnes? kg|kilograms? g|grams? mg|milligrams?",
    "lbs?|pounds? oz|ounces?",
    "dollars?|euros?|pounds? cents?|pence|¢",
    "gallons? quarts? pints? cups?",
    "degrees?|° minutes?|['′’]",
)
QUANTITY_PATTERNS = tuple(
    (
        re.compile(rf"\d\s{{0,9}}(?:{unit})\.?,?\s{{0,9}}(?:and\s{{1,9}})?$", re.IGNORECASE),
        re.compile(rf"[\s-]{{0,9}}(?:{'|'.join(smaller)})(?![A-Za-z])", re.IGNORECASE),
    )
    for units in map(str.split, UNIT_NAMES)
    for unit, *smaller in (units[i:] for i in range(len(units) - 1))
)
"""Text around the last number that makes it a part of a quantity: `3 hours 20 minutes`; not in `In
3 hours, 20 cars pass`."""
OPERATION = r"(?:[-+*/×÷·⋅]|\\(?:times|cdot|div)\b)[\s$(]{0,9}$"
TERM_BEFORE = re.compile(
    rf"\d[A-Za-z][\s$]{{0,9}}{OPERATION}|[A-Za-z\])}}][\s$]{{0,9}}[+×÷·⋅][\s$(]{{0,9}}$"
)
"""A number after it is the last term of an expression: `2x - 3`, `n + 3`."""
FORMULA_TERM_BEFORE = re.compile(rf"(?:(?<![A-Za-z])[A-Za-z]|[\])}}])[\s$]{{0,9}}{OPERATION}")
"""The same within a formula, `n - 3`. In a sentence it is a dash: `Option B - 13`."""
SIGNED_TERM_BEFORE = re.compile(r"(?:(?<![A-Za-z])[b-zB-HJ-Z]|[\d\])}])[\s$]{1,9}$")
"""The same, for a number with its own sign: `n -3`."""
TERM_AFTER = re.compile(
    r"[\s$)]{0,9}(?:[+×÷·⋅√∛∜][\s$(]{0,9}[\w\\]|\s{0,9}[\u00bc-\u00be\u2150-\u215e]"
    r"|\s\d(?!\d*(?:st|nd|rd|th)\b)"
    r"|[-*/^][\s$(]{0,9}(?:\d|[b-z](?![A-Za-z])|\\)|[-*/^][B-HJ-Z](?![A-Za-z]))"
)
"""A number before it is the first term of an expression: `13 - x`, `12-13`, `2 ⅝`."""
FORMULA_TERM_AFTER = re.compile(r"[\s$)]{0,9}[-*/^][\s$(]{0,9}[B-HJ-Z](?![A-Za-z])")
"""The same within a formula, `x = 13 - B`. `The answer is 13 - B` names a choice."""
HAN_CHAR = "[\u4e00-\u9fff]"
HAN_BORDER = re.compile(rf"(?<={HAN_CHAR})(?=[-+]?[$¥￥]?\d)|(?<=\d)(?={HAN_CHAR})")
HAN_BEFORE = re.compile(
    r"(?:不|非|未|到|于|过|约|近|负|第|之|多|少|几|[加减乘除或和与])\s{0,9}$|(?:至少|最多|可能|也许)(?:是|有)?\s{0,9}$"
    r"|(?:不是|没有|不等于)\s{0,9}$"
)
HAN_AFTER = re.compile(r"\s{0,9}(?:[多余几半倍折成或加减乘除]|左右|以上|以下|分之|不|是错|错)")
"""Chinese words next to a number that change or deny it: `约 15`, `15 多`."""
LABEL = re.compile(r"\s*(?:\(?[A-Ha-h]\)|[A-H])\s+-")
"""The letter of a choice and a dash, `B - 13`, is no formula either."""
SENTENCE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
DENIAL_BEFORE = re.compile(
    rf"(?:(?:{DENIAL.pattern}"
    r"|\b(?:thought|guessed|claimed)\b"
    r"|\b(?:up to|by one|square|cube|root|sqrt|log|ln|before|after|times)\b)[\s$*(]{0,9}"
    r"(?:(?:be|is|are|equal|exactly|to|of|from|by|it|that|the|say|think|answer)\b[\s$*:]{0,9}){0,4}"
    r"|(?<!answer)[<>≤≥≠≈~±]\s*=?[\s$]{0,9}|!=[\s$]{0,9}|[√∛∜][\s$(]{0,9}"
    r"|\\(?:n?eq|ne|[lg]eq?|[lg]t|approx|sim|pm|mp)\s*)$",
    re.IGNORECASE,
)
"""Text before a number which shows that the number is not the answer: `it is not 122`, `less than
122`, `half of 122`, `x < 122`."""


ROUNDING_WORDS = re.compile(
    r"(?:\b(?:about|around|approx(?:imate(?:ly)?)?\.?|roughly|nearly|almost|circa|close to)(?!\w)"
    r"|[≈~]|\\(?:approx|sim)(?![A-Za-z]))"
    r"\s*=?[\s$*(]{0,9}(?:(?:be|is|are|equal|equals|to)\b[\s$*:]{0,9}){0,3}$",
    re.IGNORECASE,
)
"""Words that leave a whole number open. A decimal is what they round to: `approximately 2.2`."""


def with_plain_signs(line: str) -> str:
    """Return a line with ASCII minus signs, right before their numbers, and ASCII fractions.

    Chinese words and numbers get spaces between them."""
    line = SIGN_APART.sub(r"\1\2", DASH.sub(" - ", line).translate(SIGN_TRANSLATION))
    return HAN_BORDER.sub(" ", line)


def last_number(text: str) -> Extraction | None:
    """Return the last number of a text as an answer, or why it is rejected; None without a number.

    Args:
        text: a part of a line, after `with_plain_signs`."""
    text = SPACED_THOUSANDS.sub(_without_spaces, text)
    numbers = list(LAST_NUMBER.finditer(text))
    if not numbers:
        return None
    last_match = numbers[-1]
    text_before = text[: last_match.start()]
    if HAN_BEFORE.search(text_before) or HAN_AFTER.match(text, last_match.end()):
        quotation = shorten(text[max(0, last_match.start() - 9) : last_match.end() + 9])
        return Extraction(
            None, f"no answer found: the last line changes {last_match[0]}: {quotation}"
        )
    rounding_match = ROUNDING_WORDS.search(text_before)
    if rounding_match and "." not in last_match["number"]:
        quotation = shorten(text[rounding_match.start() : last_match.end()])
        return Extraction(None, f"no answer found: {quotation!r} leaves a whole number open")
    if denial_match := DENIAL_BEFORE.search(
        text_before[: rounding_match.start()] if rounding_match else text_before
    ):
        quotation = shorten(text[denial_match.start() : last_match.end()])
        return Extraction(
            None, f"no answer found: the last line denies {last_match[0]}: {quotation}"
        )
    if change_match := CHANGE_AFTER.match(text, last_match.end()):
        quotation = shorten(text[last_match.start() : change_match.end()])
        return Extraction(
            None, f"no answer found: the last line denies or changes {last_match[0]}: {quotation}"
        )
    if len(numbers) > 1 and _is_joined(text_before, text[last_match.end() :]):
        pair = shorten(text[numbers[-2].start() : last_match.end()])
        return Extraction(None, f"no answer found: two numbers end the last line: {pair}")
    if _is_term(text_before, last_match[0], text[last_match.end() :]):
        return Extraction(None, f"no answer found: {last_match[0]} is part of an expression")
    return make_extraction(re.sub("[$,]", "", last_match[0]), "in the last line")


def _without_spaces(spaced: re.Match[str]) -> str:
    return (spaced[1] or "") + (spaced[2] or spaced[3]).replace(" ", "")


def _is_joined(before: str, after: str) -> bool:
    """Return whether a number between two texts belongs to one before it.

    They are two candidates then, or parts of a calculation or quantity."""
    if NUMBERED.search(before):
        return False
    if JOINED_NUMBERS.search(before):
        return True
    return any(unit.search(before) and smaller.match(after) for unit, smaller in QUANTITY_PATTERNS)


def _is_term(before: str, number: str, after: str) -> bool:
    """Return whether `number`, between the texts, is a term of an expression."""
    if TERM_BEFORE.search(before) or TERM_AFTER.match(after):
        return True
    tail = SENTENCE_WORD.split(before)[-1]
    is_open = before.replace("$$", "$").count("$") % 2 == 1
    in_formula = "=" in tail or r"\(" in tail or r"\[" in tail or ("$" in tail and is_open)
    if in_formula and FORMULA_TERM_AFTER.match(after):
        return True
    in_formula |= tail == before and LABEL.match(before) is None
    if number[0] in "+-" and (match := SIGNED_TERM_BEFORE.search(before)):
        return in_formula or match[0][0].isdigit()
    return in_formula and FORMULA_TERM_BEFORE.search(before) is not None
