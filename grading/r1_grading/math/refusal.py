r"""Answers that are refused before a parser reads them: unfinished, or made to hang the parser.

Unfinished: the comparison does not see the question. Where it is "compute log_2 8", the answer
`\log_2 8` has the right value and answers nothing. So an operator is accepted only where the truth
gives a reason to expect it: the same operator, or a related one.

Hostile: sympy computes powers, factorials and binomials while it parses them, so `9^{9^{9}}` has to
be recognized as text. The worker's limits of time and memory stop what passes."""

import re

from r1_grading.math.answer_structure import SEPARATORS, nesting_depth, split_top_level
from r1_grading.math.number import read_number

COMMAND_END = r"(?![A-Za-z])"
TRIGONOMETRY = (
    rf"\\(?:arc|a)?(?:sin|cos|tan|cot|sec|csc){COMMAND_END}|(?<![A-Za-z])arc(?:sin|cos|tan)"
)
LOGARITHM = rf"\\(?:log|ln|lg){COMMAND_END}"
HYPERBOLIC = "sinh|cosh|tanh|coth"
ROOT_PATTERN = r"\\sqrt|\^\s*\{[^{}]*(?:/|\\frac|\.\d)"
EXPONENTIAL = r"(?<![A-Za-z])e\s*\^|\\exp"
COUNT = (
    rf"(?<=[\w)}}])\s*!|\\(?:[dt]?binom|choose|Gamma){COMMAND_END}"
    r"|_\s*\{?\s*\w+\s*\}?\s*[CP](?![A-Za-z])"
)
ROUNDING_COMMAND = rf"\\(?:l|r)?(?:floor|ceil){COMMAND_END}|\\l(?:floor|ceil)"
BARS = r"\||\\mid"
VARIABLE = (
    r"(?<![\\A-Za-z])[A-Za-df-hj-z](?![A-Za-z])|(?<![\\A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])"
    r"|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|phi|omega|psi|xi|eta)"
    + COMMAND_END
)
# Operators that an answer must not leave open, unless the truth matches the second pattern.
OPERATOR_PATTERNS = [
    (name, re.compile(operator), re.compile(excuse))
    for name, operator, excuse in (
        ("a trigonometric function", TRIGONOMETRY, f"{TRIGONOMETRY}|{EXPONENTIAL}"),
        ("a logarithm", LOGARITHM, f"{LOGARITHM}|{HYPERBOLIC}"),
        ("a root", ROOT_PATTERN, rf"\\sqrt|\^|\\exp|{TRIGONOMETRY}|{LOGARITHM}|{HYPERBOLIC}"),
        ("a factorial or binomial", COUNT, f"{COUNT}|{VARIABLE}"),
        ("rounding", ROUNDING_COMMAND, ROUNDING_COMMAND),
        ("an absolute value", BARS, f"{BARS}|{VARIABLE}"),
    )
]
NO_OPERATOR = re.compile(r"\\text\s*\{[^{}]*\}|\\begin\s*\{array\}\s*\{[^{}]*\}")
# A number that is raised to a power; not a unit (`5 \text{ cm}^{2}`), and not a power of ten.
POWER_PATTERN = re.compile(r"(?<=[\d)])(?<!(?<!\d)10)\s*\^")
ARITHMETIC = re.compile(
    r"(?<=[\d)}!])\s*(?:[+-]|\\times|\\cdot|\\div)\s*(?=[\d({\\-])(?!\s*10\s*\^)"
)
RELATION = re.compile(
    rf"[=<>,;]|\\(?:approx|[lg]eq|neq|in|pm){COMMAND_END}|(?<![A-Za-z])(?:or|and){COMMAND_END}"
)
# Left open, these let a response copy the question: the integral to solve equals its solution.
COMPUTATIONS = re.compile(
    r"\\(?:o?i*int|sum|prod|coprod|lim(?:sup|inf)?|det|gcd|lcm|max|min|mod|pmod|bmod|operatorname)"
    r"(?![A-Za-z])|\\frac\s*\{\s*(?:d|\\partial)\s*\}|\\begin\{[vV]matrix\}|(?<![A-Za-z])(?:gcd|lcm)(?![A-Za-z])"
)
# An operator may stand on the way to a value, as in `\log_2 8 = 3`.
STEP_SIGN = re.compile(r"=|\\approx(?![A-Za-z])")

# The parser takes exponential time on nesting: seconds at eight powers within each other.
MAX_NESTING, MAX_NESTED_POWERS = 8, 4
MAX_DIGITS = 400
# At these bounds the parser takes below 0.1 s: `3000!` 0.06 s, `2^{20000}` 0.05 s (2026-11-22).
MAX_EXPONENT = 20_000
MAX_FACTORIAL = 3_000
MAX_RESULT_BITS = 100_000
NUMBER_POWER = re.compile(r"(?:(\d+)|[({]\s*(\d+)\s*[)}])\s*\^\s*\{\s*\(?\s*(\d+)\s*\)?\s*\}")
NUMBER_FACTORIAL = re.compile(r"(?:(\d+)|[({]\s*(\d+)\s*[)}])\s*!")
KNOWN_SIGNS = dict.fromkeys(map(ord, "°€£¥"))
DOUBLE_SUBSCRIPT = re.compile(r"_\s*(?:\w|\{[^{}]*\})\s*_")
DOUBLE_BRACKETS = re.compile(r"\(\s*\((\d+)\)\s*\)")
COMBINATIONS = re.compile(
    r"\\(?:[dt]?binom|choose|brace|brack)(?![A-Za-z])|_\s*\{?\s*\w+\s*\}?\s*[CP]\b"
)


def last_value_of_computation(expected: str, answer: str) -> str:
    r"""Return 1/2 of `\int_0^1 x dx = 1/2` where a truth is a number; any other answer itself."""
    left, equals, value = answer.partition("=")
    if not equals or read_number(expected) is None or read_number(value.strip()) is None:
        return answer
    is_one = len(split_top_level(left, SEPARATORS)) == 1 and COMPUTATIONS.search(left) is not None
    return value.strip() if is_one else answer


def parser_refusal_reason(expected: str, answer: str) -> str | None:
    """Return why `answer` (spelled) is not given to the parser; None where it is."""
    depth = nesting_depth(answer)
    if depth is None:
        return "its brackets do not close"
    if depth > MAX_NESTING:
        return f"brackets nested {depth} deep"
    if (depth := _nested_powers(answer)) > MAX_NESTED_POWERS:
        return f"powers nested {depth} deep"
    if DOUBLE_SUBSCRIPT.search(answer):
        return "an index on an index"
    if not answer.translate(KNOWN_SIGNS).isascii():
        return "it has characters that are no mathematics"
    if is_huge(answer):
        return "a number too large to compute"
    computations = {match[0] for match in COMPUTATIONS.finditer(answer)}
    if computations - {match[0] for match in COMPUTATIONS.finditer(expected)}:
        return "a computation is left open"
    is_sum_or_product = ARITHMETIC.search(answer) and not RELATION.search(answer)
    if is_sum_or_product and read_number(expected) is not None:
        return "a computation is left open"
    if (operator := open_operator(expected, answer)) is not None and not STEP_SIGN.search(answer):
        return f"a computation is left open: {operator}"
    return None


def open_operator(expected: str, answer: str) -> str | None:
    """Return the name of an operator that `answer` leaves open, if the truth does not excuse it."""
    if read_number(expected) is not None and POWER_PATTERN.search(answer):
        return "a power"
    expected, answer = NO_OPERATOR.sub("", expected), NO_OPERATOR.sub("", answer)
    for name, operator, excuse in OPERATOR_PATTERNS:
        if operator.search(answer) and not excuse.search(expected):
            return name
    return None


def is_division(expected: str, answer: str) -> bool:
    """Whether `answer` is a division left open, `24/2`, where the truth is a number but not one."""
    left, right = read_number(expected), read_number(answer)
    if right is None or not right.is_quotient:
        return False
    return left is not None and not left.is_quotient


def is_unfinished(expected: str, answer: str) -> bool:
    """Whether the single value `answer` is not worked out.

    Where the truth is a written number, the answer has to be one too, and two written numbers have
    been compared before."""
    return read_number(expected) is not None or open_operator(expected, answer) is not None


def is_huge(text: str) -> bool:
    """Whether computing the powers, factorials and binomials of `text` may take long."""
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text) or re.search(r"!\s*!", text):
        return True
    if any(text[end:].lstrip().startswith("^") for _, end in _braced_exponents(text)):
        return True  # 9^{9}^{9}: invalid LaTeX, which a parser may read as a tower of powers
    previous_text = None
    while text != previous_text:
        previous_text = text
        for pattern, compute in (
            (NUMBER_POWER, _bounded_power),
            (NUMBER_FACTORIAL, _bounded_factorial),
        ):
            match = pattern.search(text)
            if match is not None:
                value = compute(match)
                if value is None:
                    return True
                text = f"{text[: match.start()]}({min(value, 10**300)}){text[match.end() :]}"
                text = DOUBLE_BRACKETS.sub(r"(\1)", text)
    numbers = [int(number) for number in re.findall(rf"\d{{1,{MAX_DIGITS}}}", text)]
    has_count = re.search(r"[)}]\s*!", text) or COMBINATIONS.search(text)
    if has_count and any(number > MAX_FACTORIAL for number in numbers):
        return True
    return any(
        int(number) > MAX_EXPONENT
        for exponent, _ in _braced_exponents(text)
        for number in re.findall(r"\d+", exponent)
    )


def _bounded_power(match: re.Match[str]) -> int | None:
    base, exponent = int(match[1] or match[2]), int(match[3][:6])
    if base > 1 and (len(match[3]) > 6 or base.bit_length() * exponent > MAX_RESULT_BITS):
        return None
    return base**exponent if base > 1 else base


def _bounded_factorial(match: re.Match[str]) -> int | None:
    number = int((match[1] or match[2])[:6])
    if number > MAX_FACTORIAL:
        return None
    # Only its size matters here, and that it is not taken for a small number.
    return 1 if number < 2 else 10 ** min(number, 300)


def _braced_exponents(text: str) -> list[tuple[str, int]]:
    """Return the content of each `^{…}`, and the position where it ends."""
    exponents = []
    for match in re.finditer(r"\^\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        exponents.append((text[match.end() : end - 1], end))
    return exponents


def _nested_powers(text: str) -> int:
    stack: list[bool] = []
    max_depth = 0
    for token in re.findall(r"\^\s*\{|\\.|[{}]", text):
        if token[-1] == "{" and token[0] != "\\":
            stack.append(token[0] == "^")
            max_depth = max(max_depth, sum(stack))
        elif token == "}" and stack:
            stack.pop()
    return max_depth
