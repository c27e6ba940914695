r"""The second reader of mathematics: math-verify, and values at random points (`formulas`).

Each says right, wrong, or that it is not sure; `grade` returns both. math-verify compares
in its own way, but its parser is also the last resort of the reward, so it does not decide alone
where the two differ (docs/rewards.md).

The answer is found in tags, in one box, or in the last line. Few forms are known and all others
refused (`Unsure`): the reward's own rules are in `reading`, and what both would read alike must not
come from the same patterns."""

import logging
import re
from typing import Any

from math_verify import parse, verify

from r1_grading.base.errors import shorten
from r1_grading.reading import Reading
from r1_grading.rewards import Grade
from r1_grading.second_readers.answer_texts import Unsure, parse_answer, same_answer_texts
from r1_grading.truths import accepted_answers

THOUGHT_END = "</think>"
ANSWER_TAG = re.compile(r"</?answer>")
"""The begin or the end of an answer in tags."""
SPECIAL_TOKEN = re.compile(
    r"\s*(?:<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</s>|<eos>|<end_of_turn>)\s*\Z"
)
"""A token of a chat template at the end, such as `<|im_end|>`."""
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
"""The begin of a box, up to its content."""
DELIMITERS = re.compile(r"\\[()\[\]]|[$*`_#]")
"""What sets off formulas and emphasis, in LaTeX and in Markdown."""
HARMLESS_AFTER = re.compile(r"[\s.,;!]*\Z")
"""The rest of a line that adds nothing to the box before it."""
CONCLUDES = re.compile(
    r"(?:\b(?:is|are|get|have|equals|answer|so|thus|hence|therefore),?|[:=])\s*\Z", re.IGNORECASE
)
"""The end of a text that introduces an answer."""
CHANGES = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|doubt|maybe|perhaps|could|might|would|wrong|incorrect"
    r"|false|if|or|than|least|most|about|near|nearly|almost|half|twice|double|minus|negative|either"
    r"|unless|except|some|guess|wait|actually|correction|instead|mistake|sorry|recheck|hmm|oops)\b|n't|\?",
    re.IGNORECASE,
)
"""Words that may deny or change a value in their line."""
CONCLUSION_WORDS = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|and)\b,?\s*)?"
    r"(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:|=|is:)\s*",
    re.IGNORECASE,
)
"""How a line begins that only states an answer."""

CORRECT, INCORRECT, UNSURE = "right", "wrong", "unsure"
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def grade(
    response: str,
    truth: object,
    *,
    thought_opened: bool = False,
    reading: Reading = "strict",
    without_math_verify: bool = False,
    **entry: object,
) -> Grade:
    """Return what two methods say of a response.

    Args:
        response: the text that the policy sampled.
        truth: as of the reward `math`.
        thought_opened: the prompt ended with `<think>`.
        reading: `rewards.reading`.
        without_math_verify: ask values at points alone; math-verify's part is "unsure".
        **entry: the prompt's other fields, which are not used.

    Returns:
        A grade of 0 whose `verdict` is "math-verify's,points'", each "right", "wrong" or "unsure";
        the reason says what was read.

    Raises:
        ValueError: a truth that is blank, or not a number or string."""
    truths = [true_answer(str(truth_text)) for truth_text in accepted_answers(truth)]
    if not truths:
        raise ValueError(f"the truth of a math answer must not be empty, got {truth!r}")
    answer_text = visible_text(response, thought_opened)
    try:
        answer = find_answer(answer_text, reading) if answer_text else None
    except Unsure as error:
        # Not searched by math-verify either: in prose behind an answer it takes the last number.
        return Grade(0.0, f"it is not sure of the answer: {error}", verdict=f"{UNSURE},{UNSURE}")
    if answer is None:
        return Grade(0.0, "it finds no answer", verdict=f"{INCORRECT},{INCORRECT}")
    point_verdicts = [_point_verdict(truth_text, answer) for truth_text in truths]
    points = _best_verdict([verdict for verdict, _ in point_verdicts])
    explanation = next((reason for verdict, reason in point_verdicts if verdict == points), "")
    upstream, reason = UNSURE, f"{shorten(answer)}: values at points say {points}"
    if not without_math_verify:
        upstream = _best_verdict(
            [_math_verify_verdict(truth_text, answer) for truth_text in truths]
        )
        reason = f"{shorten(answer)}: math-verify says {upstream}, values at points {points}"
    return Grade(
        0.0, f"{reason} ({explanation})" if explanation else reason, verdict=f"{upstream},{points}"
    )


def _best_verdict(verdicts: list[str]) -> str:
    """Return the verdict of an answer for which any of several truths may stand."""
    return next(verdict for verdict in (CORRECT, UNSURE, INCORRECT) if verdict in verdicts)


def _math_verify_verdict(truth: str, answer: str) -> str:
    """Return math-verify's verdict."""
    expected = _parse_answer(truth)
    if not expected:
        return UNSURE
    return CORRECT if verify(expected, _parse_answer(answer), timeout_seconds=None) else INCORRECT


def _parse_answer(text: str) -> list[Any]:
    formula_text = text if "$" in text or r"\(" in text or r"\[" in text else f"${text}$"
    return parse(formula_text, parsing_timeout=None) or parse(text, parsing_timeout=None)


def _point_verdict(truth: str, answer: str) -> tuple[str, str]:
    if _strip_spacing(truth) == _strip_spacing(answer):
        return CORRECT, ""
    try:
        verdict = same_answer_texts(parse_answer(truth), parse_answer(answer), f"{truth}\n{answer}")
    except Unsure as error:
        return UNSURE, str(error)
    return (UNSURE if verdict is None else CORRECT if verdict else INCORRECT), ""


def _strip_spacing(text: str) -> str:
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text.replace("$", "")).rstrip(".")


def visible_text(response: str, thought_opened: bool) -> str | None:
    """Return what follows the chain of thought, stripped; None where it never ends."""
    text = response
    while (shorter_text := SPECIAL_TOKEN.sub("", text)) != text:
        text = shorter_text
    _, mark, text_after = text.rpartition(THOUGHT_END)
    if mark:
        return text_after.strip()
    return None if thought_opened or "<think>" in text else text_after.strip()


def find_answer(visible: str, reading: Reading) -> str | None:
    r"""Return the text of the answer, or None where there surely is none.

    Args:
        visible: the response after its thought.
        reading: `rewards.reading`: with "tags" and "boxed" no other place counts.

    Raises:
        Unsure: the answer may be stated in a form that has no rule here."""
    if not visible:
        return None
    tags = list(ANSWER_TAG.finditer(visible))
    if reading in ("strict", "tags", "auto") and tags:
        if [tag[0] for tag in tags] != ["<answer>", "</answer>"]:
            raise Unsure("several or unclosed answer tags")
        content = visible[tags[0].end() : tags[1].start()].strip()
        if BOX.search(content):
            return _only_box(content)
        return content or None
    if reading == "tags":
        return None
    if BOX.search(visible) and reading != "last":
        return _only_box(visible)
    if reading == "boxed":
        return None
    return _last_line(visible)


def true_answer(truth: str) -> str:
    r"""Return what a truth states: the content of its last box, the text after `####`, or all."""
    boxes = list(BOX.finditer(truth))
    if boxes and (end := _find_closing_brace(truth, boxes[-1].end())) is not None:
        return truth[boxes[-1].end() : end].strip()
    return truth.rpartition("####")[2].strip()


def _only_box(text: str) -> str:
    """Return the content of the one box, if its line only introduces it."""
    boxes = list(BOX.finditer(text))
    if len(boxes) != 1:
        raise Unsure("several boxes")
    start = boxes[0].end()
    end = _find_closing_brace(text, start)
    if end is None:
        raise Unsure("a box that is not closed")
    side_texts = text[: boxes[0].start()].rpartition("\n")[2], text[end + 1 :].partition("\n")[0]
    text_before, text_after = (DELIMITERS.sub(" ", part) for part in side_texts)
    is_introduced = not text_before.strip() or CONCLUDES.search(text_before)
    if (
        not is_introduced
        or re.search(r"\d", text_before)
        or CHANGES.search(text_before)
        or not HARMLESS_AFTER.match(text_after)
    ):
        raise Unsure("words or signs next to the box")
    lines = [line for line in text[end:].splitlines()[1:] if DELIMITERS.sub("", line).strip()]
    if any(CHANGES.search(line) for line in lines):
        raise Unsure("words after the box")
    if not text[start:end].strip():
        raise Unsure("an empty box")
    return text[start:end].strip()


def _find_closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    return None


def _last_line(visible: str) -> str:
    """Return what a line with the mark `####` states, or one that only states an answer.

    Without such a line it is the last one."""
    lines = [re.sub(r"\*\*", "", line).strip() for line in visible.splitlines() if line.strip()]
    stating_numbers = [
        number
        for number, line in enumerate(lines)
        if "####" in line or CONCLUSION_WORDS.match(line) is not None
    ]
    if len(stating_numbers) > 1:
        raise Unsure("several marks")
    number = stating_numbers[0] if stating_numbers else len(lines) - 1
    if any(re.search(r"\d", line) or CHANGES.search(line) for line in lines[number + 1 :]):
        raise Unsure("words after the answer")
    if any(line.startswith((">", "```")) for line in lines):
        raise Unsure("a quotation")
    line = lines[number].rpartition("####")[2]
    if CHANGES.search(line) or re.search(r"(?:\A|\s)[-–]\s", line):
        raise Unsure("a sentence, or an item of a list")
    return CONCLUSION_WORDS.sub("", line.strip(), count=1).strip()
