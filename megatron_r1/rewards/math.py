"""Accuracy of a mathematical answer, by math-verify (huggingface/Math-Verify).

math-verify's own time limits are signals, which do not fire inside a C call; they are switched off
here, and whoever calls this on untrusted text does so through `RewardPool`, which kills.
"""

import logging
import re
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify

from megatron_r1.rewards.answer import describe, extract, is_balanced, unwrap
from megatron_r1.rewards.base import Grade

MAX_ANSWER_CHARS = 2_000
NUMBER = re.compile(r"[+-]?[0-9]{1,300}(?:(?P<point>\.)[0-9]{1,300}|/[0-9]{1,300})?")

# It warns, once per process, that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def grade(
    response: str,
    truth: object,
    *,
    opened: bool = False,
    plain_line: bool = False,
    **entry: object,
) -> Grade:
    r"""1 when the response's final answer (see `answer.extract`) is mathematically `truth`, else 0.

    truth: a number, or a string: LaTeX with or without dollar signs and `\boxed{}`, or a word.
    Raises ValueError for a truth that is blank or not a number or string.
    """
    expected = _expected(truth)
    extraction = extract(response, opened=opened, plain_line=plain_line)
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    if (num_chars := len(extraction.text)) > MAX_ANSWER_CHARS:
        reason = f"answer too long: {num_chars} characters, at most {MAX_ANSWER_CHARS} are read"
        return Grade(0.0, reason)
    answer = unwrap(extraction.text)
    if not answer:
        return Grade(0.0, "no answer found: it is empty")
    correct = equivalent(expected, answer)
    return Grade(float(correct), describe(answer, expected, correct))


def equivalent(expected: str, answer: str) -> bool:
    """Whether `answer` means the same as `expected`; both without decoration (`answer.unwrap`)."""
    if expected == answer or (expected.isalpha() and expected.casefold() == answer.casefold()):
        return True
    quick = equal_numbers(expected, answer)
    if quick is not None:
        return quick
    return verified(expected, answer)


def equal_numbers(expected: str, answer: str) -> bool | None:
    """Exact comparison of plain integers, decimals and fractions; None where it cannot tell.

    Unequal decimals are left to math-verify, which compares them to six places.
    """
    numbers = [NUMBER.fullmatch(text) for text in (expected, answer)]
    if None in numbers:
        return None
    try:
        left, right = (Fraction(match[0]) for match in numbers)
    except ZeroDivisionError:
        return None
    if left == right:
        return True
    return None if any(match["point"] for match in numbers) else False


def verified(expected: str, answer: str) -> bool:
    r"""math-verify's verdict, the expected answer first: the order matters to it.

    The other order would accept `1` for the equation `2x + z = 1`. Everything is parsed as the
    whole of a box: without one, math-verify takes the last number of a text, and `x^2 + 13` is 13.
    """
    if not (is_balanced(answer) and is_balanced(expected)):
        return False
    parsed = [
        parse(
            rf"\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig()],
            parsing_timeout=None,
        )
        for text in (expected, answer)
    ]
    return verify(*parsed, timeout_seconds=None)


def _expected(truth: object) -> str:
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        raise ValueError(f"the truth of a math answer is a string or a number, got {truth!r}")
    expected = unwrap(str(truth))
    if not expected:
        raise ValueError(f"the truth of a math answer must not be blank, got {truth!r}")
    return expected


# The first parse builds the parser's tables, which takes 0.2 s and more on a busy machine: here it
# counts as import, and not against the time limit of the first answer.
verified(r"\frac{1}{2}", "x + 1")
