"""Prepares the texts that judges and reward models read.

A text is a part of a response, cut to a size, without control tokens, in a template."""

import re
from typing import Literal

from r1_grading.base.errors import Cause, UserError
from r1_grading.reading.tags_and_boxes import END_THINK, THINK, Extraction, after_thought

Part = Literal["summary", "response"]
# Control tokens that chat templates write between turns. The server's tokenizer would read their
# text as the tokens themselves: a response could end its own turn and begin another.
CONTROL_TOKEN = re.compile(
    r"<(?=[|｜])|(?<=[|｜])>|"
    r"[\[<](?=/?INST\])|<(?=</?SYS>>)|"
    r"<(?=/?(?:s|bos|eos|pad|unk)>)|<(?=(?:start|end)_of_turn>)",
    re.IGNORECASE,
)
TEMPLATE_PLACEHOLDERS = re.compile(r"\{(question|response)\}")


def chain_of_thought(response: str, thought_opened: bool = False) -> str | None:
    """Return the text from the first `<think>` to the last `</think>`; None without a `<think>`.

    A thought that is never closed (a response cut at its length limit) extends to the end.

    Args:
        response: the text that the policy sampled.
        thought_opened: the prompt ended with `<think>`, so the response begins inside the
            thought."""
    if not thought_opened:
        _, opening_tag, response = response.partition(THINK)
        if not opening_tag:
            return None
    thought, end_tag, remainder = response.rpartition(END_THINK)
    return (thought if end_tag else remainder).replace(THINK, " ").replace(END_THINK, " ")


def prepare_texts(
    question: str, response: str, part: Part, thought_opened: bool, max_chars: int
) -> tuple[str, Extraction]:
    """Return the question and the `part` of the response, without control tokens.

    Args:
        question: the prompt's question.
        response: the text that the policy sampled.
        part: the part that is read, as in `response_part`.
        thought_opened: the prompt ended with `<think>`.
        max_chars: the length to about which the part is cut.

    Returns:
        The question, and the part; its text is None where the response has no such part."""
    extraction = response_part(response, part, thought_opened)
    if extraction.text is not None:
        extraction = Extraction(cut_middle(break_control_tokens(extraction.text), max_chars))
    return break_control_tokens(question), extraction


def fill_template(template: str, question: str, response: str) -> str:
    """Return `template` with both texts filled in.

    Args:
        template: a text with {question} and {response}.
        question: the prompt's question.
        response: the part of the response that is read."""
    texts = {"question": question, "response": response}
    # One pass: a question that contains "{response}" keeps it.
    return TEMPLATE_PLACEHOLDERS.sub(lambda match: texts[match[1]], template)


def chat_messages(question: str, response: str) -> list[dict[str, str]]:
    """Return both texts as messages for a chat template."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def check_template(template: str | None) -> str | None:
    """Return `template`.

    Raises:
        UserError: the template lacks {response}.
    """
    if template is not None and "{response}" not in template:
        message = f"template must contain {{response}}, got {template!r}"
        raise UserError(message, key="template", cause=Cause.MALFORMED)
    return template


def response_part(response: str, part: Part, thought_opened: bool) -> Extraction:
    """Return one part of a response.

    Args:
        response: the text that the policy sampled.
        part: "summary" is the text after the thought, stripped: the whole text of a response
            without a thought, and no text if the thought is never closed. "response" is the whole
            response with its thought.
        thought_opened: whether the prompt ended with `<think>`, which is then put back before the
            whole response."""
    if part == "response":
        text = THINK + response if thought_opened else response
        return Extraction(text) if response.strip() else Extraction(None, "the response is empty")
    summary = after_thought(response, thought_opened)
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
    half_chars = max_chars // 2
    num_missing = len(text) - 2 * half_chars
    return f"{text[:half_chars]}\n[... {num_missing} characters left out ...]\n{text[-half_chars:]}"
