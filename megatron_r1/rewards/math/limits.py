r"""What is refused before a parser sees it: answers made to hang one, and unfinished computations.

sympy computes powers, factorials and binomials while it reads them, so `9^{9^{9}}` has to be
recognised as text. The time and memory limits of the worker stand behind all this.
"""

import re

from megatron_r1.rewards.math.finished import open_operator, open_sum
from megatron_r1.rewards.math.structure import nesting

# The parser takes exponential time on these: seconds at eight powers within each other.
MAX_NESTING, MAX_NESTED_POWERS = 8, 4
MAX_DIGITS = 400
MAX_EXPONENT = 20_000
MAX_FACTORIAL = 3_000
MAX_RESULT_BITS = 100_000
POWER = re.compile(r"(?:(\d+)|[({]\s*(\d+)\s*[)}])\s*\^\s*\{\s*\(?\s*(\d+)\s*\)?\s*\}")
FACTORIAL = re.compile(r"(?:(\d+)|[({]\s*(\d+)\s*[)}])\s*!")
KNOWN_SIGNS = dict.fromkeys(map(ord, "°€£¥"))
DOUBLE_SUBSCRIPT = re.compile(r"_\s*(?:\w|\{[^{}]*\})\s*_")
DOUBLE_BRACKETS = re.compile(r"\(\s*\((\d+)\)\s*\)")
COMBINATIONS = re.compile(
    r"\\(?:[dt]?binom|choose|brace|brack)(?![A-Za-z])|_\s*\{?\s*\w+\s*\}?\s*[CP]\b"
)
# Left open, these let a response copy the question: the integral to solve equals its solution.
COMPUTATIONS = re.compile(
    r"\\(?:o?i*int|sum|prod|coprod|lim(?:sup|inf)?|det|gcd|lcm|max|min|mod|pmod|bmod|operatorname)"
    r"(?![A-Za-z])|\\frac\s*\{\s*(?:d|\\partial)\s*\}|\\begin\{[vV]matrix\}|(?<![A-Za-z])(?:gcd|lcm)(?![A-Za-z])"
)
# On the way to a value, as in `\log_2 8 = 3`, they may stand.
STEPS = re.compile(r"=|\\approx(?![A-Za-z])")


def refusal(expected: str, answer: str) -> str | None:
    """Why `answer` (spelled) is not given to the parser; None where it may be."""
    depth = nesting(answer)
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
    open_ones = {match[0] for match in COMPUTATIONS.finditer(answer)}
    if open_ones - {match[0] for match in COMPUTATIONS.finditer(expected)}:
        return "a computation is left open"
    if open_sum(expected, answer):
        return "a computation is left open"
    if (operator := open_operator(expected, answer)) is not None and not STEPS.search(answer):
        return f"a computation is left open: {operator}"
    return None


def is_huge(text: str) -> bool:
    """Whether computing the powers, factorials and binomials of `text` may take long."""
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text) or re.search(r"!\s*!", text):
        return True
    if any(text[end:].lstrip().startswith("^") for _, end in _exponents(text)):
        return True  # 9^{9}^{9}: no LaTeX, and a tower to whoever reads it as one
    before = None
    while text != before:
        before = text
        for pattern, fold in ((POWER, _power), (FACTORIAL, _factorial)):
            match = pattern.search(text)
            if match is not None:
                value = fold(match)
                if value is None:
                    return True
                text = f"{text[: match.start()]}({min(value, 10**300)}){text[match.end() :]}"
                text = DOUBLE_BRACKETS.sub(r"(\1)", text)
    numbers = [int(number) for number in re.findall(rf"\d{{1,{MAX_DIGITS}}}", text)]
    if re.search(r"[)}]\s*!", text) and any(number > MAX_FACTORIAL for number in numbers):
        return True
    if COMBINATIONS.search(text) and any(number > MAX_FACTORIAL for number in numbers):
        return True
    exponents = [exponent for exponent, _ in _exponents(text)]
    return any(
        int(number) > MAX_EXPONENT for part in exponents for number in re.findall(r"\d+", part)
    )


def _power(match: re.Match) -> int | None:
    base, exponent = int(match[1] or match[2]), int(match[3][:6])
    if base > 1 and (len(match[3]) > 6 or base.bit_length() * exponent > MAX_RESULT_BITS):
        return None
    return base**exponent if base > 1 else base


def _factorial(match: re.Match) -> int | None:
    number = int((match[1] or match[2])[:6])
    if number > MAX_FACTORIAL:
        return None
    # Its size is all that matters here, and that it cannot be taken for a small number.
    return 1 if number < 2 else 10 ** min(number, 300)


def _exponents(text: str) -> list[tuple[str, int]]:
    """What each `^{…}` holds, and where it ends."""
    exponents = []
    for match in re.finditer(r"\^\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        exponents.append((text[match.end() : end - 1], end))
    return exponents


def _nested_powers(text: str) -> int:
    stack, deepest = [], 0
    for token in re.findall(r"\^\s*\{|\\.|[{}]", text):
        if token[-1] == "{" and token[0] != "\\":
            stack.append(token[0] == "^")
            deepest = max(deepest, sum(stack))
        elif token == "}" and stack:
            stack.pop()
    return deepest
