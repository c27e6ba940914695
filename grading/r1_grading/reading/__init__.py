"""Reads a response's final answer, at the place of `rewards.answer`.

`strict` is DeepSeek-R1-Zero's: a policy learns the form in which it answers. Models that were
trained before, on forms of their own, are graded by where they put their answers: in a box, or in
the last line, as "The sum of 59 and 63 is 122."."""

import re
from collections.abc import Callable
from typing import Literal, get_args

from r1_grading.base.errors import Cause, UserError, shorten
from r1_grading.reading.answer import (
    ANSWER,
    BOXES,
    END_ANSWER,
    END_THINK,
    MARKER,
    OPEN_THOUGHT,
    THINK,
    Extraction,
    after_thought,
    extract,
    in_tags,
    last_boxed,
    last_line,
    present,
    unwrap,
    without_special_tokens,
)
from r1_grading.reading.context import (
    after_answer_is,
    changes_box,
    last_number,
    with_plain_signs,
    with_scales,
)
from r1_grading.reading.languages import HAN, HAN_PER_WORD, LANGUAGES, judged_words
from r1_grading.reading.marked import marked_answer

Part = Literal["summary", "response"]
# Control tokens that chat templates write between turns. The server's tokenizer would read their
# text as the tokens themselves: a response could end its own turn and begin another.
CONTROL_TOKEN = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>|"
    r"[\[<](?=/?INST\])|<(?=</?SYS>>)|"
    r"<(?=/?(?:s|bos|eos|pad|unk)>)|<(?=(?:start|end)_of_turn>)",
    re.IGNORECASE,
)
PLACEHOLDERS = re.compile(r"\{(question|response)\}")
Reading = Literal["strict", "tags", "boxed", "last", "auto"]
READINGS: tuple[str, ...] = get_args(Reading)
READERS = ("math", "logic", "exact_match")
"""The rewards whose option `reading` `rewards.answer` sets."""
NUMERIC_TRUTH = re.compile(r"\s*[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s*")
"""A truth that is one number in digits (`is_number`)."""
EMPHASIS = "*_` "
EMPHASIZED = re.compile(r"(?<![\w)*])\*\*([^*\n]+)\*\*(?![\w(*])")
MAX_LINE_CHARS = 2_000
CLOSING_LINE = re.compile(
    r"(?:does (?:this|that) (?:make sense|help)|let me know|(?:i )?hope (?:this|that|it)"
    r"|(?:please )?feel free|is there anything|would you like|do you (?:have|want|need)"
    r"|if you (?:have|need|want))\b[^\d\\]{0,200}",
    re.IGNORECASE,
)
MAX_CLOSING_LINES = 3


def read_answer(
    response: str,
    reading: str = "strict",
    *,
    opened: bool = False,
    plain_line: bool = False,
    numeric: bool = False,
) -> Extraction:
    r"""Return the final answer of a response, read as `reading` says, after its chain of thought.

    An answer that is marked before closing prose (`marked.marked_answer`) is read instead of the
    last line. A box outside of tags is no answer where the text next to it changes or denies it
    (`context.changes_box`). The time is linear in the length of the response.

    Args:
        response: the text that the policy sampled.
        reading: "strict" is `answer.extract`, with `plain_line`. "tags" is the one `<answer>`
            block. "boxed" is the last `\boxed{}`. "last" is the text after `####` or "answer is" in
            the last line that is not blank; if the truth is `numeric`, the last number of that
            text. "auto" is the first of tags, boxed and last that is present.
        opened: whether the prompt ended with `<think>`.
        plain_line: whether "strict" also reads a last line that is the answer.
        numeric: whether the truth is one number (`is_number`).

    Returns:
        The answer's text, or None with the reason why there is none.

    Raises:
        ValueError: another reading."""
    if reading not in READINGS:
        raise ValueError(f"rewards.answer: {reading!r} is not one of {', '.join(READINGS)}")
    visible = after_thought(without_special_tokens(response), opened)
    if visible is None:
        return OPEN_THOUGHT
    if reading == "strict":
        is_line = plain_line and in_tags(visible) is None and last_boxed(visible) is None
        marked = marked_answer(visible, numeric) if is_line else None
        return _unchanged(marked or extract(response, opened=opened, plain_line=plain_line))
    for name, find in FINDERS.items():
        if reading in (name, "auto") and (found := find(visible, numeric)) is not None:
            return _unchanged(found)
    return Extraction(None, f"no answer found: {ABSENT.get(reading, 'the response is empty')}")


def without_closing(text: str) -> str:
    """Return a text without last lines that only close it: `Does that make sense?`."""
    text = text.rstrip()
    for _ in range(MAX_CLOSING_LINES):
        before, _, line = text.rpartition("\n")
        if not before.strip() or not CLOSING_LINE.fullmatch(line.strip()):
            break
        text = before.rstrip()
    return text


def is_number(truth: object) -> bool:
    """Return whether a truth is one number, written in digits."""
    return NUMERIC_TRUTH.fullmatch(str(truth)) is not None


def _unchanged(found: Extraction) -> Extraction:
    """Return `found`, or no answer where the text next to its box changes the box."""
    if found.text is None or not changes_box(found.around):
        return found
    box = shorten(found.text)
    return Extraction(None, f"no answer found: what is beside the box of {box} changes it")


def _tagged(visible: str, numeric: bool) -> Extraction | None:
    found = in_tags(visible)
    return found and Extraction(found.text, found.reason, "in its tags")


def _boxed(visible: str, numeric: bool) -> Extraction | None:
    content = last_boxed(visible)
    return None if content is None else present(content, "in its box", around=visible)


def _last(visible: str, numeric: bool) -> Extraction | None:
    line = last_line(without_closing(visible))
    if not line.strip():
        return None
    marked = marked_answer(visible, numeric)
    if len(line) > MAX_LINE_CHARS:
        return marked or Extraction(
            None, f"no answer found: the last line has {len(line)} characters"
        )
    if (content := last_boxed(line)) is not None:
        return present(content, "in the last line", around=visible)
    if marked is not None:
        return marked
    _, marker, answer = line.rpartition(MARKER)
    if marker:
        return present(answer, "in the last line")
    line = EMPHASIZED.sub(r"\1", line)
    if numeric:
        line = with_scales(with_plain_signs(line))
    stated = after_answer_is(line) or line
    if numeric:
        return last_number(stated) or present(stated, "in the last line")
    whole = stated.strip(EMPHASIS)
    return present(whole.removesuffix(".").rstrip(EMPHASIS) or whole, "in the last line")


FINDERS: dict[str, Callable[[str, bool], Extraction | None]] = {
    "tags": _tagged,
    "boxed": _boxed,
    "last": _last,
}
ABSENT = {"tags": "there is no <answer> block", "boxed": r"there is no \boxed{}"}


def chain_of_thought(response: str, opened: bool = False) -> str | None:
    """Return the text from the first `<think>` to the last `</think>`; None without a `<think>`.

    opened: the prompt ended with `<think>`, so the response begins inside the thought. A thought
    that is never closed (a response cut at its length limit) extends to the end."""
    if not opened:
        _, found, response = response.partition(THINK)
        if not found:
            return None
    inside, closed, rest = response.rpartition(END_THINK)
    return (inside if closed else rest).replace(THINK, " ").replace(END_THINK, " ")


def prepare_texts(
    question: str, response: str, part: Part, opened: bool, max_chars: int
) -> tuple[str, Extraction]:
    """Return the question and the `part` of the response, without control tokens.

    The part is cut to about `max_chars`; its text is None where the response has no such part."""
    extraction = response_part(response, part, opened)
    if extraction.text is not None:
        extraction = Extraction(cut_middle(break_control_tokens(extraction.text), max_chars))
    return break_control_tokens(question), extraction


def fill_template(template: str, question: str, response: str) -> str:
    """Return `template` with both texts filled in."""
    texts = {"question": question, "response": response}
    # One pass: a question that contains "{response}" keeps it.
    return PLACEHOLDERS.sub(lambda match: texts[match[1]], template)


def chat_messages(question: str, response: str) -> list[dict[str, str]]:
    """Return both texts as messages for a chat template."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def check_template(template: str | None) -> str | None:
    """Return `template`. Raises UserError for one without {response}."""
    if template is not None and "{response}" not in template:
        message = f"template must contain {{response}}, got {template!r}"
        raise UserError(message, key="template", cause=Cause.MALFORMED)
    return template


def response_part(response: str, part: Part, opened: bool) -> Extraction:
    """Return one part of a response.

    Args:
        response: the text that the policy sampled.
        part: "summary" is the text after the thought, stripped: the whole text of a response
            without a thought, and no text if the thought is never closed. "response" is the whole
            response with its thought.
        opened: whether the prompt ended with `<think>`, which is then put back before the whole
            response."""
    if part == "response":
        text = THINK + response if opened else response
        return Extraction(text) if response.strip() else Extraction(None, "the response is empty")
    summary = after_thought(response, opened)
    if summary is None:
        return Extraction(None, "no summary: the thought is never closed")
    summary = summary.strip()
    return Extraction(summary) if summary else Extraction(None, "no summary: it is empty")


def break_control_tokens(text: str) -> str:
    """Return `text` in valid UTF-8 with every chat control token broken by a space."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    return CONTROL_TOKEN.sub(lambda sign: " >" if sign[0] == ">" else f"{sign[0]} ", text)


def cut_middle(text: str, max_chars: int) -> str:
    """Cut `text` to about `max_chars`.

    Kept are equal parts of its beginning and of its end, where the answer is, with a note between
    them of how much is missing."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    missing = len(text) - 2 * half
    return f"{text[:half]}\n[... {missing} characters left out ...]\n{text[-half:]}"
