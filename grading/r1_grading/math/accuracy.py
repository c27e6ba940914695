r"""Accuracy of a mathematical answer: extracted from the response, then compared with the truth.

The rules are in `comparison`; expressions are parsed by math-verify's latex2sympy and compared by
sympy. math-verify's own time limits are signals, which do not fire inside a C call, and are off.
Untrusted text is graded within `RewardPool`, which kills a worker that takes too long."""

import functools

from r1_grading.base.errors import shorten
from r1_grading.math.comparison import compare_answers
from r1_grading.math.worded_answers import same_words, stated_answer, without_rounding
from r1_grading.reading import Reading, is_number, read_answer
from r1_grading.reading.context import changes_box, without_conclusion
from r1_grading.reading.tags_and_boxes import (
    describe_comparison,
    final_answers,
    stated_numbers,
    trim_invisible,
    unwrap_answer,
)
from r1_grading.rewards import Grade
from r1_grading.truths import accepted_answers, answer_after_mark, math_truth

MAX_ANSWER_CHARS = 2_000
MAX_EXTRA_CHARS = 400
"""A correct answer is about as long as the truth; parsing takes time quadratic in the length."""
CACHE_SIZE = 4_096


def grade(
    response: str,
    truth: object,
    *,
    thought_opened: bool = False,
    reading: Reading = "strict",
    reads_last_line: bool = True,
    **entry: object,
) -> Grade:
    r"""Return 1 when the response's final answer is mathematically `truth`, else 0.

    The answer is found by `read_answer`.

    Args:
        response: the text that ends with the answer.
        truth: a number or a string: words, or LaTeX with or without dollar signs and `\boxed{}`; it
            may be a whole solution whose answer is in a box or after `####` (GSM8K); of several
            (`truths.accepted_answers`) the answer is any one.
        thought_opened: the prompt ended with `<think>`.
        reading: where the answer is, as in `read_answer`.
        reads_last_line: whether a last line is read, as in `read_answer`; by default the last line
            is the answer where there is no `<answer>` and no box.
        **entry: the prompt's other fields, which are not used.

    Raises:
        ValueError: a truth that is blank, or not a number or string."""
    options = accepted_answers(truth)
    if not options:
        raise ValueError(f"the truth of a math answer must not be empty, got {truth!r}")
    grades = [
        _grade_against_truth(response, option, thought_opened, reading, reads_last_line)
        for option in options
    ]
    return max(grades, key=lambda grade: grade.reward)


def _grade_against_truth(
    response: str, truth: object, thought_opened: bool, reading: Reading, reads_last_line: bool
) -> Grade:
    """Return the grade of a response against one truth.

    Where a row has several, the best one counts."""
    expected = math_truth(truth)
    truth = answer_after_mark(str(truth))
    truth_answer = _extract_truth_answer(truth)
    extraction = read_answer(
        response,
        reading,
        thought_opened=thought_opened,
        reads_last_line=reads_last_line,
        numeric=is_number(expected),
    )
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    if (num_chars := len(extraction.text)) > MAX_ANSWER_CHARS:
        return _too_long(num_chars, MAX_ANSWER_CHARS)
    is_sentence = len(extraction.text.split()) > 2
    if is_sentence and same_words(truth, extraction.text, ignore_case=False):
        return Grade(1.0, describe_comparison(extraction.text, expected, True, extraction.source))
    if changes_box(extraction.text, alone=True):
        why = f"refused: {shorten(extraction.text)}: the text next to the box changes it"
        return Grade(0.0, why)
    *earlier_answers, answer = map(_stated_alone, final_answers(extraction.text))
    earlier_answers += stated_numbers(extraction.text)[:-1]
    limit = max(min(MAX_ANSWER_CHARS, 2 * len(expected) + MAX_EXTRA_CHARS), len(expected))
    if (num_chars := len(answer)) > limit:
        return _too_long(num_chars, limit)
    if not answer:
        return Grade(0.0, "no answer found: it is empty")
    is_correct, refusal = _compare(truth_answer, without_rounding(answer, truth_answer))
    if refusal:
        return Grade(0.0, f"refused: {shorten(answer)}: {refusal}")
    for earlier_answer in earlier_answers if is_correct else ():
        if not _compare(truth_answer, earlier_answer)[0]:
            return Grade(0.0, f"two answers: {shorten(earlier_answer)}, and then {shorten(answer)}")
    return Grade(
        float(is_correct), describe_comparison(answer, expected, is_correct, extraction.source)
    )


def same_answer(expected: str, answer: str) -> bool:
    """Whether `answer` means the same as `expected`; both from `unwrap_answer`.

    It may take long: call it for trusted text only, or inside a worker of the pool."""
    return _compare(expected, answer)[0]


# The samples of a group repeat each other's answers.
_compare = functools.lru_cache(maxsize=CACHE_SIZE)(compare_answers)


def _too_long(num_chars: int, limit: int) -> Grade:
    return Grade(0.0, f"answer too long: {num_chars} characters, at most {limit} are read")


def _extract_truth_answer(truth: str) -> str:
    r"""Return the answer that a truth states.

    It is the content of its last box or the text after `####`, of a sentence its value ("The answer
    is 13."); any other truth is the answer itself."""
    truth = final_answers(trim_invisible(truth))[-1]
    answer = stated_answer(truth)
    return answer if any(character.isdigit() for character in answer) else truth


def _stated_alone(text: str) -> str:
    r"""Return the answer that a text states, also of `$\therefore 13$`."""
    return unwrap_answer(without_conclusion(unwrap_answer(stated_answer(text))))


def grade_equivalence(response: str, truth: str, **entry: object) -> Grade:
    """Return 1 if each of the two answers is accepted when the other is the truth.

    A vote needs a symmetric relation, which math-verify's comparison is not: if 1 is expected it
    accepts `2x + z = 1`, but not the other way round."""
    is_equal = same_answer(truth, response) and same_answer(response, truth)
    return Grade(float(is_equal), "the same" if is_equal else "different")
