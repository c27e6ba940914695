r"""Whether an answer is worked out, or still holds the operator that the question asked about.

The comparison does not see the question. Where it is "compute log_2 8", the answer `\log_2 8` has
the right value and says nothing; so an operator is accepted only where the truth gives a reason to
expect it: its own kind, or one that belongs to it.
"""

import re

from megatron_r1.rewards.math.number import read_number

LETTER_END = r"(?![A-Za-z])"
TRIGONOMETRY = (
    rf"\\(?:arc|a)?(?:sin|cos|tan|cot|sec|csc){LETTER_END}|(?<![A-Za-z])arc(?:sin|cos|tan)"
)
LOGARITHM = rf"\\(?:log|ln|lg){LETTER_END}"
HYPERBOLIC = "sinh|cosh|tanh|coth"
ROOT = r"\\sqrt|\^\s*\{[^{}]*(?:/|\\frac|\.\d)"
EXPONENTIAL = r"(?<![A-Za-z])e\s*\^|\\exp"
COUNT = (
    rf"(?<=[\w)}}])\s*!|\\(?:[dt]?binom|choose|Gamma){LETTER_END}"
    r"|_\s*\{?\s*\w+\s*\}?\s*[CP](?![A-Za-z])"
)
ROUNDING = rf"\\(?:l|r)?(?:floor|ceil){LETTER_END}|\\l(?:floor|ceil)"
BARS = r"\||\\mid"
VARIABLE = (
    r"(?<![\\A-Za-z])[A-Za-df-hj-z](?![A-Za-z])|(?<![\\A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])"
    r"|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|phi|omega|psi|xi|eta)" + LETTER_END
)
# What an answer may not leave open, unless the truth has something of the second pattern.
OPERATORS = [
    (name, re.compile(operator), re.compile(excuse))
    for name, operator, excuse in (
        ("a trigonometric function", TRIGONOMETRY, f"{TRIGONOMETRY}|{EXPONENTIAL}"),
        ("a logarithm", LOGARITHM, f"{LOGARITHM}|{HYPERBOLIC}"),
        ("a root", ROOT, rf"\\sqrt|\^|\\exp|{TRIGONOMETRY}|{LOGARITHM}|{HYPERBOLIC}"),
        ("a factorial or binomial", COUNT, f"{COUNT}|{VARIABLE}"),
        ("rounding", ROUNDING, ROUNDING),
        ("an absolute value", BARS, f"{BARS}|{VARIABLE}"),
    )
]
NO_OPERATOR = re.compile(r"\\text\s*\{[^{}]*\}|\\begin\s*\{array\}\s*\{[^{}]*\}")
# Not of a unit (`5 \text{ cm}^{2}`), and not a power of ten.
POWER = re.compile(r"(?<=[\d)])(?<!(?<!\d)10)\s*\^")
ARITHMETIC = re.compile(
    r"(?<=[\d)}!])\s*(?:[+-]|\\times|\\cdot|\\div)\s*(?=[\d({\\-])(?!\s*10\s*\^)"
)
RELATION = re.compile(
    r"[=<>,;]|\\(?:approx|[lg]eq|neq|in|pm)(?![A-Za-z])|(?<![A-Za-z])(?:or|and)(?![A-Za-z])"
)


def open_operator(expected: str, answer: str) -> str | None:
    """The name of an operator that `answer` leaves open without the truth giving a reason to."""
    if read_number(expected) is not None and POWER.search(answer):
        return "a power"
    expected, answer = NO_OPERATOR.sub("", expected), NO_OPERATOR.sub("", answer)
    for name, operator, excuse in OPERATORS:
        if operator.search(answer) and not excuse.search(expected):
            return name
    return None


def open_sum(expected: str, answer: str) -> bool:
    """Whether `answer`, a single value, is a sum or a product where a number is expected."""
    if not ARITHMETIC.search(answer) or RELATION.search(answer):
        return False
    return read_number(expected) is not None


def is_division(expected: str, answer: str) -> bool:
    """Whether `answer` is a division that is still to be done, `24/2`, and the truth is none."""
    left, right = read_number(expected), read_number(answer)
    if right is None or not right.is_quotient:
        return False
    return left is not None and not left.is_quotient


def is_unfinished(expected: str, answer: str) -> bool:
    """Whether the single value `answer` is no form to end in.

    A number that is written out is expected to be written out: what else equals it, and is no
    written number itself (those have been compared before), is a computation.
    """
    return read_number(expected) is not None or open_operator(expected, answer) is not None
