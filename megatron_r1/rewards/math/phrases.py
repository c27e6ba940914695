"""What answers say in words where mathematics has a sign or other words; dates and times."""

import re

from megatron_r1.rewards.math.text import plain

PHRASES = {
    r"\emptyset": (*("empty set", "the empty set", "none", r"\varnothing", r"\{\}", r"\{ \}"),),
    r"\infty": ("infinity", "positive infinity"),
    r"\mathbb{R}": ("all real numbers", "all reals", "every real number", "the real numbers"),
    "does not exist": (
        *("dne", "d.n.e", "doesn't exist", "do not exist", "undefined", "is undefined"),
        *("not defined", "is not defined", "the limit does not exist", "limit does not exist"),
        *("it does not exist", "nonexistent", "non-existent"),
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
DATES = [
    re.compile(pattern) for pattern in (rf"{MONTH} {DAY}{YEAR}", rf"{DAY} (?:of )?{MONTH}{YEAR}")
]
TIME = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))? ?(?P<half>[ap])\.?m\.?")


def read_phrase(text: str) -> str:
    """The sign that `text` is a phrase for, or one phrase for all of its meaning; else `text`."""
    # No phrase is longer; a text of ten thousand characters is not searched for one.
    if len(text) > 80:
        return text
    words = plain(text).lower()
    return r"\emptyset" if NO_SOLUTION.fullmatch(words) else MEANINGS.get(words, text)


def read_moment(text: str) -> tuple[str, ...] | None:
    """A date such as `April 5` or a time such as `5 pm`, in one form; None for anything else."""
    if len(text) > 80:
        return None
    text = plain(text).lower()
    for date in DATES:
        if (match := date.fullmatch(text)) is not None:
            return match["month"][:3], match["day"].lstrip("0"), match["year"] or ""
    if (match := TIME.fullmatch(text)) is not None:
        return match["hour"].lstrip("0"), match["minute"] or "00", match["half"]
    return None
