r"""Answers in words: letters of choices, phrases, dates, sentences. Compared as text, not by sympy.

(A parser reads `no` as n times o, which equals `on`.)"""

import re
import unicodedata
from math import gcd

from r1_grading.math.units import NO_UNITS, is_unit
from r1_grading.reading.context import DENIAL, after_answer_is, leads_to_answer, without_conclusion

LETTER = r"[A-J]"
TEXT_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|textrm|mathit|textsf|mathsf|boldsymbol|mbox|emph)\s*\{([^{}]*)\}"
)
ANSWER_PREFIX = re.compile(
    r"(?:(?:i|we) (?:would |will |)(?:choose|pick|select|go with) (?:(?:option|choice|answer) )?"
    r"|(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?\s*:?\s+)",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"\(\s*(?P<round>[A-Ja-j])\s*\)[.:]?(?P<rest0>.*)"
    r"|\[\s*(?P<square>[A-J])\s*\][.:]?(?P<rest1>.*)"
    r"|(?P<bare>[A-J])\s*(?:[).:]\s*(?P<rest2>.*)|(?P<end>))",
    re.DOTALL,
)
# In the text after a label: another label, or the rest of a list of letters.
FURTHER_LABEL = re.compile(
    r"\([A-Ja-j]\)|\[[A-J]\]|(?:^|[^A-Za-z]|\\[a-z]+)[A-J][).:]"
    r"|^(?:or|and|[,/&])\s*[A-J](?![A-Za-z])|[,/&]\s*[A-J]$|^[^A-Za-z0-9]*[A-J][^A-Za-z0-9]*$"
)
LETTERS = re.compile(
    rf"\(?{LETTER}\)?(?:\s*(?:[,;&、，]|,?\s*\band\b)?\s*\(?(?<![A-Za-z]{{9}}){LETTER}\)?){{1,9}}"
)
"""Letters of several choices."""
CAPITALS = re.compile(r"[A-Z]{2,3}")
SHORT_WORDS = frozenset(
    ["yes", "no", "odd", "even", "all", "any", "one", "two", "six", "ten", "tie"]
)
LATIN_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
STATED_IN_CHINESE = re.compile(r"(?<!错误)(?<!错误的)(?<!错)答案?(?:是|为|等于|[:：])[\s:：*=]*")
# The words that state an answer in other languages, at the beginning: `Ответ: 13`, `答えは13`.
STATED_ELSEWHERE = re.compile(
    r"(?:(?:la |die |a |el )?(?:respuesta|réponse|antwort|resposta|risposta|odpowiedź|cevap|ответ"
    r"|đáp án|đáp số)(?: final(?:e)?| correcta?)?\s*(?:[:：=]|(?:es|est|ist|é|è)\b\s*:?)"
    r"|(?:(?:故|因此|所以|综上)[，,]?\s*)?(?:应|正确)?选(?:择|项)?(?:是|为)?\s*[:：]?(?=\s*[(（]?[A-J])"
    r"|(?:答え|解答|答)\s*(?:は|[:：])|(?:정답|답)\s*(?:은|[:：]))\s*",
    re.IGNORECASE,
)
# One number, and words around it that name its meaning.
EXISTENCE_SENTENCE = re.compile(
    r"there (?:is|are|were|was|will be) (?P<number>\d[\d.,]*(?: [a-z]+){0,3})[.\s]*", re.IGNORECASE
)
EQUALITY_SENTENCE = re.compile(
    r"(?:the )?(?P<name>[a-z][a-z' ]{0,80}) (?:is|equals) "
    r"(?P<number>[-+]?(?:\d[\d.,/]*(?: [a-z/]+){0,3}|\\[dt]?frac\{\d+\}\{\d+\}))[.\s]*",
    re.IGNORECASE,
)
DECIMAL = re.compile(r"\.\d")
ROUNDED_DECIMAL = re.compile(
    r"\$?\s*(?:(?:about|around|approximately|approx\.?|roughly|nearly|almost)\s+|[≈~]\s*"
    r"|\\(?:approx|sim)(?![A-Za-z])\s*)(?=[\s$]*[-−]?\d*\.\d)",
    re.IGNORECASE,
)
STATED_VALUE = re.compile(
    r"(?:the |its |their |our )?(?P<name>[a-z][a-z' ]{0,60}?) (?:is|are|equals?|was|were)"
    r"(?: at| given by)?:? "
    r"(?P<value>(?=[^A-Za-z]{0,9}(?:\d|[\[({\\]|[A-Za-z](?:\([a-z]\))?\s?[=^+*/-]))[^?!]*\d[^?!]*?)[\s.]*",
    re.IGNORECASE,
)
r"""A sentence that states a value which is no single number: `The solutions are 7 and -2.`."""
STATED_MOMENT = re.compile(
    r"(?:the |its |their )?(?:[a-z]{1,20} ){0,2}(?:date|day|time) (?:is|was) (?P<value>.*?)[\s.]*",
    re.IGNORECASE,
)
ANOTHER = re.compile(
    r"^(?:it|this|that|which|what|he|she|they|there)$|\b(?:first|previous|next|initial|old|original|last|given|other|question|problem|step"
    r"|answer|correct|reward|grade|score|hint)\b",
    re.IGNORECASE,
)
SINGLE_NUMBER = re.compile(r"[-+]?[\d.,/]+\s*\\?%?")
NAMING = frozenset(["time", "two", "three", "four", "five", "six"])
"""Words of names that change a value elsewhere: `the two numbers are`."""
VALUE_WORDS = frozenset(
    ["and", "or", "pi", "sqrt", "sin", "cos", "tan", "ln", "log", "infinity", "am", "pm"]
)
TWO_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
UNIT_AT_END = re.compile(r"\s+((?:square |cubic )?[A-Za-z]{1,20})([²³]?)$")
MAX_STATED_CHARS = 300
CLOSING_WORDS = re.compile(r"[\s.]*I hope (?:it|this) is correct[\s.]*$", re.IGNORECASE)
ENDING_FORMULA = re.compile(
    r"[^$\d\\]*(?P<formula>\$[^$]+\$|\$\$[^$]+\$\$|\\\((?:[^\\]|\\[^()])+\\\)"
    r"|\\\[(?:[^\\]|\\[^\[\]])+\\\])[\s.*]*"
)
# `\text{The sum is } 204` is a sentence, `\text{Area} = 204` an equation.
OPENING_WORDS = re.compile(
    r"\\(?:text|mathrm|mathbf)(?:rm|bf|it)?\s*\{([^{}]*[A-Za-z][^{}]*)\}(?=[\s\\,;:$]*[^\s=<>\\^_]|\\)"
)
TEXT_COMMAND = re.compile(
    r"\\text(?:rm|bf|it)?\s*\{([^{}]*(?:\banswer\b|答案)[^{}]*)\}", re.IGNORECASE
)
ANSWER_SENTENCE = re.compile(
    r"(?P<value>.*\S)\s+is (?:the|our|my) (?:final |correct )?answer[\s.]*"
    r"|(?P<letter>\(?[A-J]\)?)\s+is (?:the )?(?:correct|right)(?: (?:choice|option|one))?[\s.]*",
    re.IGNORECASE,
)
# `correct: 13` is what a grader would say.
LABELLED = re.compile(
    r"(?!correct|reward|grade|score)(?P<name>[A-Za-z][A-Za-z' ]{2,60}):\s*(?P<rest>[-+\d$\\(].*)",
    re.DOTALL,
)
# `**13** apples`, but not the powers of `2**3**2`.
EMPHASIS_MARK = re.compile(r"(?<![\w)}\].])\*\*(?=[^\s*])([^*\n]*[^\s*])\*\*(?![\w({\[])")

MAX_PHRASE_CHARS = 80
PHRASES = {
    r"\emptyset": ("empty set", "the empty set", "none", r"\varnothing", r"\{\}", r"\{ \}"),
    r"\infty": ("infinity", "positive infinity"),
    r"\mathbb{R}": ("all real numbers", "all reals", "every real number", "the real numbers"),
    "does not exist": (
        "dne",
        "d.n.e",
        "doesn't exist",
        "do not exist",
        "undefined",
        "is undefined",
        "not defined",
        "is not defined",
        "the limit does not exist",
        "limit does not exist",
        "it does not exist",
        "nonexistent",
        "non-existent",
    ),
}
MEANINGS = {phrase: meaning for meaning, phrases in PHRASES.items() for phrase in phrases}

NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) |(?:the|this) (?:equation|system|inequality) has )?"
    r"no (?:real )?solutions?(?: exists?)?"
)
MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
DAY, YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?:,? (?P<year>\d{4}))?"
DATES = [re.compile(rf"{MONTH} {DAY}{YEAR}"), re.compile(rf"{DAY} (?:of )?{MONTH}{YEAR}")]
TIME = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))? ?(?P<half>[ap])\.?m\.?")
CLOCK = re.compile(r"(?P<hour>[01]?\d|2[0-4]):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?")
ISO_DATE = re.compile(r"(?P<year>\d{4})-(?P<month>0[1-9]|1[0-2])-(?P<day>0[1-9]|[12]\d|3[01])")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def stated_answer(text: str) -> str:
    r"""Return the answer of a sentence that ends with it: 13 of `The answer is 13.`.

    Any other text is returned whole; so is a sentence with a number before its formula."""
    text = EMPHASIS_MARK.sub(r"\1", CLOSING_WORDS.sub("", text)).strip()
    text = TEXT_COMMAND.sub(r"\1", text)
    if (match := OPENING_WORDS.match(text)) is not None and not LABEL.fullmatch(match[1].strip()):
        text = match[1].strip() + " " + re.sub(r"^(?:\\[ ,;:]|\s)+", "", text[match.end() :])
    text = without_conclusion(text.strip())
    if (match := STATED_ELSEWHERE.match(text)) is not None:
        text = re.sub(r"(?:です|だ|입니다|이다)[.。]?$", "", text[match.end() :])
    phrases = list(STATED_IN_CHINESE.finditer(text))
    statement = after_answer_is(text) or (text[phrases[-1].end() :] if phrases else "")
    if statement.strip("* \n.$"):
        text = statement.strip("* \n")
    elif (match := ANSWER_SENTENCE.fullmatch(text)) is not None:
        text = match["value"] or match["letter"]
    if (match := ENDING_FORMULA.fullmatch(text)) is not None:
        return match["formula"] if leads_to_answer(text[: match.start("formula")]) else text
    return _sentence_value(text) or _stated_value(text) or text.lstrip("= ")


def _stated_value(text: str) -> str | None:
    """Return what a sentence states, with its unit: `(2, -1)` of `The point is (2, -1)`.

    It is a pair, interval, list, ratio, time, equation or formula; None for other text."""
    if len(text) > MAX_STATED_CHARS:
        return None
    if (moment_match := STATED_MOMENT.fullmatch(text.strip())) and read_moment(
        moment_match["value"]
    ):
        return moment_match["value"]
    match = STATED_VALUE.fullmatch(text.strip())
    if match is None or DENIAL.search(match["name"]) or ANOTHER.search(match["name"]):
        return None
    if not NO_UNITS.isdisjoint({*match["name"].lower().split()} - NAMING):
        return None
    value = match["value"].replace("$", "").strip()
    if SINGLE_NUMBER.fullmatch(value):  # of `_sentence_value`
        return None
    words = TWO_LETTERS.findall(TEXT_WRAPPER.sub(" ", value))
    *words_before, last_word = words or [""]
    if last_word not in VALUE_WORDS and is_unit(last_word):
        words = [word for word in words_before if word not in ("square", "cubic")]
        if r"\text" not in value:
            value = UNIT_AT_END.sub(r" \\text{ \1}\2", value)
    return value if all(word.lower() in VALUE_WORDS for word in words) else None


def _sentence_value(text: str) -> str | None:
    """Return the number, with its unit, of `There are 13 apples`.

    Likewise of `The value of x is 13`, and the value of `Total: 13`."""
    text = text.strip()
    if (match := EXISTENCE_SENTENCE.fullmatch(text.replace("$", ""))) is not None:
        return match["number"]
    if (match := LABELLED.fullmatch(text)) is None:
        match = EQUALITY_SENTENCE.fullmatch(re.sub(r"\\?\$", "", text))
    # `The previous answer is 13`: where the words before it state the answer, they are gone here.
    if match is None or DENIAL.search(match["name"]) or "answer" in match["name"].lower():
        return None
    if any(word in NO_UNITS for word in match["name"].lower().split()):
        return None
    return match[2]


def without_markup(text: str) -> str:
    """Return `text` without marks that change no value.

    These are font commands, dollar signs, emphasis, repeated spaces and a last full stop. Letters
    are composed (NFC), but not replaced by similar ones."""
    text = unicodedata.normalize("NFC", text)
    previous_text = None
    while text != previous_text:
        previous_text, text = text, TEXT_WRAPPER.sub(r" \1 ", text)
    text = re.sub(r"\\[,;:!]|\\ |~|\\q?quad(?![A-Za-z])|[$*]", " ", text)
    return " ".join(text.split()).removesuffix(".").rstrip()


def read_choice(text: str) -> tuple[str, str] | None:
    """Read the letter of a choice and the text after it: `C`, `(C)`, `C.

    12`, `option C`. None for any other text, and where a second letter is named."""
    text = ANSWER_PREFIX.sub("", without_markup(text), count=1)
    if (match := LABEL.fullmatch(text)) is None:
        return None
    choice_text = (match["rest0"] or match["rest1"] or match["rest2"] or "").strip()
    if FURTHER_LABEL.search(choice_text):
        return None
    return (match["round"] or match["square"] or match["bare"]).upper(), choice_text


def same_letter(letter: str, answer: str) -> bool:
    """Compare with a truth that is the letter of a choice: `C`, `(C)`."""
    choice = read_choice(answer)
    if choice is not None:
        return choice[0] == letter
    plain_text = without_markup(answer)
    return len(plain_text) == 1 and plain_text.islower() and plain_text.upper() == letter


def read_letters(text: str) -> str | None:
    """Return the letters of several choices in their order, `ABD` or `A, B and D`.

    None for any other text."""
    match = LETTERS.fullmatch(without_markup(text))
    letters = re.findall(LETTER, match[0]) if match else []
    return "".join(letters) if letters == sorted(set(letters)) and len(letters) > 1 else None


def without_label(text: str) -> str | None:
    r"""Return the text after the label of a choice, 27 of `\textbf{(E)}\ 27`, or None."""
    choice = read_choice(text)
    if (
        choice is None
        or not choice[1]
        or not re.match(r"\(\s*[A-J]\s*\)|[A-J][).]", without_markup(text))
    ):
        return None
    return choice[1]


def is_letter(text: str) -> bool:
    """Whether a truth is only the letter of a choice: `C`, `C.` or `(C)`."""
    choice = read_choice(text)
    return choice is not None and not choice[1] and not re.search("[a-j]", without_markup(text))


def is_order(text: str) -> bool:
    """Two or three capitals side by side: an order or points, never a product of three numbers."""
    return CAPITALS.fullmatch(without_markup(text)) is not None


def is_words(text: str, original: str) -> bool:
    r"""Whether a truth is words and not a formula: `north`, `right angle`, `\text{even}`.

    Without `\text{}`, up to three letters may be a product: `xy` is not a word, `yes` is."""
    words = without_markup(text).split()
    if not words or not all(LATIN_WORD.fullmatch(word.strip(",;:!?()")) for word in words):
        return False
    if original.lstrip("$ ").startswith((r"\text", r"\mathrm", r"\mathbf", r"\boxed{\text")):
        return len(words) > 1 or len(words[0]) > 1
    lower_words = [word.lower() for word in words]
    return any(len(word) > 3 or word in SHORT_WORDS for word in lower_words)


def same_words(expected: str, answer: str, *, ignore_case: bool) -> bool:
    """Whether both texts are equal apart from decoration and spaces.

    Args:
        expected: the truth.
        answer: the response's answer.
        ignore_case: whether upper and lower case are equal."""
    left, right = without_markup(expected), without_markup(answer)
    if ignore_case:
        left, right = (side.rstrip("!").lower() for side in (left, right))
    return left != "" and left == right


def read_phrase(text: str) -> str:
    """Return the sign for a phrase such as "no solution", or one phrase for all of its meaning.

    Any other text is unchanged."""
    if len(text) > MAX_PHRASE_CHARS:
        return text
    words = without_markup(text).lower()
    return r"\emptyset" if NO_SOLUTION.fullmatch(words) else MEANINGS.get(words, text)


def read_moment(text: str) -> tuple[str, ...] | None:
    """Read a date (`April 5`, `2024-04-05`) or a time (`5 pm`, `12:30`); None for any other text.

    Two numbers in lowest terms, such as `2:3` and `5:12`, are a ratio."""
    if len(text) > MAX_PHRASE_CHARS:
        return None
    text = without_markup(text).lower()
    for date_pattern in DATES:
        if (match := date_pattern.fullmatch(text)) is not None:
            return match["month"][:3], match["day"].lstrip("0"), match["year"] or ""
    if (match := TIME.fullmatch(text)) is not None:
        return match["hour"].lstrip("0"), match["minute"] or "00", match["half"]
    if (match := CLOCK.fullmatch(text)) is not None:
        hour, minute = int(match["hour"]), int(match["minute"])
        if minute < 10 or match["second"] or gcd(hour, minute) > 1:
            return str(hour), match["minute"], match["second"] or "", "clock"
    if (match := ISO_DATE.fullmatch(text)) is not None:
        return MONTHS[int(match["month"]) - 1], match["day"].lstrip("0"), match["year"]
    return None


def without_rounding(text: str, truth: str) -> str:
    r"""Return `3.14` of `\approx 3.14` where the truth, too, is a decimal.

    The answer is rounded to it. Any other text stays as it is: `about 13` leaves a whole number
    open."""
    rounding_match = ROUNDED_DECIMAL.match(text) if DECIMAL.search(truth) else None
    return text[rounding_match.end() :].replace("$", "").strip() if rounding_match else text
