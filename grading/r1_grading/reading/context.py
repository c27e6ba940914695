r"""Reads the text around a number or a box, which states it as the answer, denies it or changes it.

`the answer is 204` and `we get $204$` state it; `less than $204$`, `it cannot be $204$` and
`half of the answer is 204` do not. Whether words state a number is decided by lists of what does:
there are too many ways to say something else. `last_number` reads the last number of a line as its
answer, and refuses one that the text around it denies, joins to another number, or makes a part of
an expression. `changes_box` finds text next to the last box of an answer, in its line, that changes
it: `-\boxed{13}`, `\boxed{13}^2`, `less than \boxed{13}`, `\boxed{13} is wrong`. Other text
explains the answer."""

import re
from fractions import Fraction

from r1_grading.base.errors import shorten
from r1_grading.reading.answer import Extraction, box_span, make_extraction

# Subjects and verbs of another value: `the lower bound is`, `it could be`, `suppose x is`.
DENYING = """
    not never no cannot neither nor nobody none hardly false wrong incorrect untrue mistaken doubt
    less more greater smaller fewer larger bigger lower higher above below over under beyond
    exceed exceeds bound bounds bounded within between near nearly almost close around about
    approximately approximate approximation approx roughly circa estimate estimated
    except excluding besides but unlike instead rather different other than unequal off far
    opposite negative minus reciprocal inverse half twice double triple
    if unless whether suppose assume assuming let guess maybe perhaps possibly probably could might
    may would
"""
DENIAL = re.compile(
    rf"\b(?:{'|'.join(DENYING.split())}|at (?:least|most|best|worst))\b|n['’]t\b", re.IGNORECASE
)
CHANGE_AFTER = re.compile(
    r"[\s$*)]{0,9}(?:[!?]*\?|\+(?=[\s$*.]*$)|-?ish\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed)\b"
    r"|(?:less|fewer)(?=[\s$*.!]*$)"
    r"|or (?:more|less|fewer|so|maybe|perhaps|possibly)\b|\(?(?:not|un)\s?(?:sure|certain)\b"
    r"|(?:is|was) (?:too|wrong|incorrect|false)\b"
    r"|(?:is|was)(?: not|n['’]t)(?=[\s$*]*(?:$|[.,;:!?)])"
    r"|(?: (?:it|the|my|an?|final|correct|right|valid|required)){0,3}"
    r" (?:it|answer|solution|correct|right|valid|true|possible)\b))",
    re.IGNORECASE,
)
"""Text after a number which shows that the number alone is not the answer: `122 million`, `122 or
so`, `122 is wrong`, `122 squared`, `122?`. `122 is not listed` may explain the answer."""
# What may stand right before a formula that is the answer: `we get`, `equal to`, `a total of`.
LEAD = re.compile(
    r"(?:^|[:=,.]|\b(?:is|are|was|were|be|equals?|gives?|get|gets|got|have|has|had|find|finds|found"
    r"|obtain|obtains|yields?|conclude|that|makes?|takes?|took|costs?|earns?|needs?|leaves|becomes?"
    r"|means|giving|yielding|leaving|so|thus|hence|therefore|then|finally|exactly|only|just|precisely|simply|answer|value"
    r"|result|(?:given|obtained) by|to be"
    r"|(?:equal|equals|simplif(?:y|ies)|evaluates?|comes?|amounts?|reduces?|sums?|adds? up"
    r"|converges?|leads?) to"
    r"|(?:total|sum|value|area|volume|length|distance|probability|perimeter|average|speed|maximum"
    r"|minimum|radius|cost) of))[\s*:]*$",
    re.IGNORECASE,
)
ANSWER_IS = re.compile(
    r"(?<!\w)answer\b(?: to (?:the|this|that|your) (?:question|problem|puzzle))?[\s*]*"
    r"(?:(?:is|to)\b|[:=]|(?=\s\S))(?:\s+(?:therefore|thus|then|simply|just|exactly)\b)?[\s:*=]*",
    re.IGNORECASE,
)
# The words of a clause up to `answer`, where it states the answer: `so the final answer`.
BEFORE_ANSWER = """
    the a an my our your this that it final correct right simplified numerical numeric exact best
    required desired expected complete short full and so thus hence therefore then finally now
    which means implies gives here's here is we i get have see conclude say can to question
    problem option choice multiple closed form integer decimal answer
"""
CLAUSE = re.compile(r".*[.,;:!?)\n{}]", re.DOTALL)
CONCLUSION = re.compile(
    r"(?:(?:and|so|thus|hence|therefore|then|finally|consequently|accordingly|overall|in total"
    r"|as a result|in (?:conclusion|summary|short)"
    r"|(?:it|this|which) (?:follows|means|implies|gives|shows|yields)(?: us)?(?: that)?"
    r"|we (?:get|have|find|obtain|conclude|see|know)(?: that)?)\b"
    r"|\\(?:therefore|implies|Rightarrow|Longrightarrow|rightarrow|to)(?![A-Za-z])|[∴⇒⟹→]|=>)"
    r"\s*[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
MAX_CONCLUSIONS = 4


def leads_to_answer(before: str) -> bool:
    """Whether `before`, the sentence up to a formula, states the formula."""
    return DENIAL.search(before) is None and LEAD.search(before.rstrip(" $*")) is not None


def after_answer_is(text: str) -> str | None:
    """Return the text after the last "answer is", "answer:" or "answer =", "" included.

    None where there is none, or where the words before it change it: `the wrong answer is`."""
    phrases = list(ANSWER_IS.finditer(text))
    if not phrases:
        return None
    clause = CLAUSE.sub("", text[: phrases[-1].start()]).lower()
    if not set(BEFORE_ANSWER.split()).issuperset(clause.strip("*#$ ").split()):
        return None
    return text[phrases[-1].end() :]


def without_conclusion(text: str) -> str:
    """Return `text` without words that draw a conclusion: `So`, `Therefore, we get`."""
    for _ in range(MAX_CONCLUSIONS):
        text = text[match.end() :] if (match := CONCLUSION.match(text)) else text
    return text


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
    """Return a text with such numbers in digits: `it costs 4.50`."""
    text = CENTS.sub(lambda match: f"{match['whole']}.{int(match['cents']):02}", text)
    return SCALED_NUMBER.sub(_digits, text)


def _digits(match: re.Match[str]) -> str:
    value = apply_scale(match["number"], match["scale"])
    return match[0] if value is None else f"{value} " if match["scale"] in "万亿" else str(value)


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


MAX_BESIDE_CHARS = 200
LINK_WORDS = r"[\s$*]{0,9}(?:(?:be|is|equal|equals|exactly|to)\b[\s$*]{0,9}){0,3}$"
OPERATION_BEFORE_BOX = re.compile(
    # A sign: right before the box, after `=` or a bracket, or at the beginning of a formula. With a
    # space or a dollar sign after it, it may also be a dash: `Final answer: - $\boxed{13}$`.
    r"(?:(?:^|[\s$({\[=:,*])[-−]$|[=({\[]\s{0,9}[-−–][\s$]{0,9}$|(?:^|(?<=[\s(*$]))\$\s?[-−–]\s{0,9}$"
    r"|^[-−]\$$|\b(?:is|equals)\s[-−]\$$"
    # An operator or function, and up to one argument of it.
    r"|\\(?:sqrt\s*(?:\[[^][]{0,20}\])?|[dt]?frac\s*(?:\{[^{}]{0,80}\})?"
    r"|(?:log|ln)\s*(?:_\s*(?:\w|\{[^{}]{0,20}\}))?|not|neg|pm|mp|neq?|[lg]t)\s*\{?[\s$]{0,9}$"
    r"|(?:[<≠√∛]|(?<!^)(?<![-=<>|｜])>)[\s$]{0,9}$"
    r"|(?:\b(?:not|never|cannot|(?<!no )(?<!not )(?:less|more|fewer|greater|other) than|half of"
    rf"|twice|negative|minus)|n['’]t)\b{LINK_WORDS})",
    re.IGNORECASE,
)
NO_SUM = "(?<!add )(?<!adds )(?<!adding )(?<!sum )(?<!sums )"
"""`adds up to \\boxed{13}` states a sum."""
BOUND_BEFORE_BOX = re.compile(
    rf"(?:^\s*[-−–][\s$]{{0,9}}$|\\[lg]eq?\s*\{{?[\s$]{{0,9}}$|\b(?:at (?:least|most)|{NO_SUM}up to"
    rf"|not? (?:less|more|fewer|greater) than)\b{LINK_WORDS})",
    re.IGNORECASE,
)
"""A dash that may be a sign, and bounds, which a question may ask for. They change the box only
where an answer is alone, in tags."""
ROUNDED_BOX = re.compile(
    rf"\b(?:about|approximately|roughly|nearly|almost)\b{LINK_WORDS}", re.IGNORECASE
)
"""Words that leave a whole number open, in tags. A decimal is what they round to: `about
\\boxed{3.14}`."""
DECIMAL = re.compile(r"\.\d")
LINE_MARK = re.compile(r"^\s{0,9}(?:(?:>|[-*+](?=\s)|\d{1,2}[.)](?=\s))\s{0,9}){0,4}")
"""Marks of quotes and lists at the beginning of a line: `> \\boxed{13}`, `- \\boxed{13}`."""
HTML_TAG = re.compile(r"</?[A-Za-z][^<>]{0,80}>")
OPERATION_AFTER_BOX = re.compile(
    # A power, but not a degree or an ordinal (`^\circ`, `^{th}`, `^\text{th}`).
    r"\s{0,9}(?:\^\s*\{?\s*(?:[-+]?\d|[a-np-z](?![a-z])|\\(?:[dt]?frac|sqrt|pi)(?![a-z]))"
    # `\boxed{13} - 1`; after a formula that ends, it is a dash: `$\boxed{13}$ - 5 and 8 added`.
    r"|[-+*/]\s*(?:\d|\\(?:sqrt|[dt]?frac|pi)(?![a-z]))|[-+*/]\("
    r"|\\(?:pm|mp|cdot|times|div)(?![a-z]))",
    re.IGNORECASE,
)
CHOICE = re.compile(r"\\f?box(?:ed)?\s*\{(?:\\[a-z]{1,9}\s*\{|[\s$(]){0,4}[A-J][\s$).}]{1,6}")
"""A box with a choice. What follows may be its text: `\\boxed{A} - 13 apples`."""


def changes_box(text: str, *, alone: bool = False) -> bool:
    """Return whether the text next to the last box, in its line, changes its value or denies it.

    It takes time linear in the length of the text.

    Args:
        text: the text with the box.
        alone: whether the text is an answer alone, without its solution. It must commit itself, so
            `about` and `at most` change it, too."""
    span = box_span(text)
    if span is None:
        return False
    start, end = span
    text_before = text[max(start - MAX_BESIDE_CHARS, 0) : start]
    text_after = text[end : end + MAX_BESIDE_CHARS].partition("\n")[0]
    is_first_line = "\n" not in text_before
    text_before = HTML_TAG.sub("", text_before.rpartition("\n")[2])
    if not (alone and is_first_line):
        text_before = LINE_MARK.sub("", text_before, count=1)
    if text_before.endswith("*"):
        text_after = text_after.lstrip("*")  # it ends an emphasis, and is no product
    is_choice = CHOICE.fullmatch(text, start, end) is not None
    if OPERATION_BEFORE_BOX.search(text_before) or (
        not is_choice and OPERATION_AFTER_BOX.match(text_after)
    ):
        return True
    is_open = ROUNDED_BOX.search(text_before) and not DECIMAL.search(text, start, end)
    if alone and (is_open or BOUND_BEFORE_BOX.search(text_before)):
        return True
    # A question may ask for the choice that is wrong: `\boxed{B} is false`.
    is_number = re.search(r"\d", text[start:end]) is not None
    return (alone or is_number) and CHANGE_AFTER.match(text_after) is not None
