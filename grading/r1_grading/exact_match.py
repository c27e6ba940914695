"""Accuracy of an answer in words, as questions of facts are graded.

Such are Natural Questions, TriviaQA and HotpotQA.

Both sides are compared in lower case, without punctuation and English articles (SQuAD,
arXiv 1606.05250; its evaluation script)."""

import re
import string
import unicodedata

from r1_grading.base.errors import shorten
from r1_grading.reading import Reading, read_answer
from r1_grading.reading.tags_and_boxes import describe_comparison
from r1_grading.rewards import Grade
from r1_grading.truths import accepted_answers, math_truth

MAX_ANSWER_CHARS = 2_000
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
INITIALS = re.compile(r"(?<=\b\w\.) +(?=\w\.)")
"""Between initials: `J. K. Rowling` is `J.K. Rowling`."""
PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»–—…")


def grade(
    response: str,
    truth: object,
    *,
    thought_opened: bool = False,
    reading: Reading = "strict",
    reads_last_line: bool = True,
    **entry: object,
) -> Grade:
    """Return 1 when the response's final answer equals the truth, or any of several, else 0.

    The answer is found by `read_answer`.

    Args:
        response: the text that ends with the answer.
        truth: text or a number, or several (`truths.accepted_answers`).
        thought_opened: the prompt ended with `<think>`.
        reading: where the answer is, as in `read_answer`.
        reads_last_line: whether a last line is read, as in `read_answer`.
        **entry: the prompt's other fields, which are not used.

    Raises:
        ValueError: a truth that is blank, or neither text nor a number."""
    expected = [math_truth(option) for option in accepted_answers(truth)]
    if not expected:
        raise ValueError("the truth is a list without an answer")
    extraction = read_answer(
        response, reading, thought_opened=thought_opened, reads_last_line=reads_last_line
    )
    if extraction.text is None:
        return Grade(0.0, extraction.reason)
    if (num_chars := len(extraction.text)) > MAX_ANSWER_CHARS:
        return Grade(0.0, f"answer too long: {num_chars} characters, at most {MAX_ANSWER_CHARS}")
    answer = normalize_answer(extraction.text)
    is_correct = bool(answer) and answer in {normalize_answer(option) for option in expected}
    expected_text = " or ".join(map(shorten, expected[:3]))
    return Grade(
        float(is_correct),
        describe_comparison(extraction.text, expected_text, is_correct, extraction.source),
    )


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and repeated spaces."""
    words = INITIALS.sub("", unicodedata.normalize("NFKC", text).casefold()).translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", words).split())
