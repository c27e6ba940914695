"""Training data of reward models: pairs of responses to a question, or labelled responses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import Message, is_chat, read_chat, read_transcript
from megatron_r1.data.rows import CanonicalRow, read_canonical_rows, require_text

Kind = Literal["pairwise", "pointwise"]
QUESTION_COLUMNS = ("question", "prompt", "instruction")
RESPONSE_COLUMNS = ("response", "completion")


@dataclass(frozen=True)
class Preference:
    """One row: responses to a question, each with its label; of a pair, the better one first.

    Attributes:
        question: the text that the responses answer.
        responses: two for a pair, else one.
        labels: one per response, 1 for good, 0 for bad.
        thought_opened: whether the prompt ended with `<think>`, which the responses then do not
            repeat.
        location: "file:line" of the row.
    """

    question: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    thought_opened: bool
    location: str


def kind_of_rows(rows: Sequence[CanonicalRow]) -> Kind | None:
    """Return what rows are: pairs, labelled responses, or None for neither."""
    if all(row.get("chosen") and row.get("rejected") for row in rows):
        return "pairwise"
    has_labels = all(_is_label(row.get("label")) for row in rows)
    has_responses = all(any(row.get(name) for name in RESPONSE_COLUMNS) for row in rows)
    return "pointwise" if has_labels and has_responses else None


def read_preferences(path: str | Path, kind: Kind) -> Iterator[Preference]:
    """Yield the rows of a JSONL or Parquet file. They are {"question", "chosen", "rejected"} for
    pairwise and {"question", "response", "label"} for pointwise, label 1 or true for a good
    response, 0 or false for a bad one. "prompt" or "instruction" is read where "question" is
    missing, "completion" where "response" is; "thought_opened" is false by default. Question and
    responses may be chats, or transcripts, of one question.

    Raises:
        UserError: a bad row, with file and line.
    """
    for location, row in read_canonical_rows(path):
        response_name = next(
            (name for name in RESPONSE_COLUMNS if name in row), RESPONSE_COLUMNS[0]
        )
        names = ("chosen", "rejected") if kind == "pairwise" else (response_name,)
        row = _chat_texts(location, row, names)
        question_name = next((name for name in QUESTION_COLUMNS if name in row), "prompt")
        question = require_text(location, row, question_name)
        if "opened" in row:
            raise UserError(
                f"{location}: 'opened' is called 'thought_opened'",
                key="opened",
                cause=Cause.UNSUPPORTED,
            )
        thought_opened = row.get("thought_opened", False)
        if not isinstance(thought_opened, bool):
            raise UserError(
                f"{location}: 'thought_opened' must be true or false, it is {thought_opened!r}",
                key="thought_opened",
                cause=Cause.MALFORMED,
            )
        responses = tuple(require_text(location, row, name) for name in names)
        labels: tuple[float, ...] = (1.0, 0.0)
        if kind == "pointwise":
            labels = (_read_label(location, row),)
        elif responses[0] == responses[1]:
            raise UserError(
                f"{location}: 'chosen' and 'rejected' are the same text",
                key="rejected",
                cause=Cause.DUPLICATE,
            )
        yield Preference(question, responses, labels, thought_opened, location)


def _chat_texts(location: str, row: CanonicalRow, names: Sequence[str]) -> CanonicalRow:
    """Return the row with question and responses as text, where some of them are chats.

    Raises:
        UserError: responses to different questions, or several turns."""
    prompt_value = next(
        (row[name] for name in (*QUESTION_COLUMNS, "conversations") if row.get(name)), None
    )
    question_chat, chats = _as_chat(prompt_value), [_as_chat(row.get(name)) for name in names]
    if question_chat is None and not any(chats):
        return row
    if question_chat is None and isinstance(prompt_value, str):
        question_chat = [{"role": "user", "content": prompt_value}]
    messages_before: list[Message] = []
    texts = {}
    is_read = True
    for name, chat in zip(names, chats, strict=True):
        text = row.get(name)
        *chat_messages, last_message = chat or [{"role": "assistant", "content": text}]
        chat_messages = chat_messages or question_chat or []
        is_read &= last_message["role"] == "assistant" and chat_messages == (
            messages_before or chat_messages
        )
        messages_before, texts[name] = chat_messages, last_message["content"]
    users = [message["role"] for message in messages_before if message["role"] != "system"]
    if not is_read or users != ["user"]:
        raise UserError(
            f"{location}: {' and '.join(map(repr, names))} must answer the same one question: "
            "chats of a user's message, a system's before it or not, and the assistant's; shorten "
            "the chats",
            key=names[0],
            cause=Cause.MALFORMED,
        )
    return {
        **row,
        "question": "\n\n".join(message["content"] for message in messages_before),
        **texts,
    }


def _as_chat(value: Any) -> list[Message] | None:
    """Return the messages of a chat, a transcript or a single message; None for other values."""
    if isinstance(value, Mapping) and is_chat([value]):
        value = [value]
    try:
        return read_chat(value) or read_transcript(value)
    except ValueError:
        return None


def _is_label(label: Any) -> bool:
    return isinstance(label, int | float) and label in (0, 1)  # booleans are integers


def _read_label(location: str, row: CanonicalRow) -> float:
    label: Any = row.get("label")
    if _is_label(label):
        return float(label)
    actual_text = f"is {label!r}" if "label" in row else f"is missing (has {', '.join(row)})"
    raise UserError(
        f"{location}: 'label' must be 1 or true for a good response, else 0; it {actual_text}",
        key="label",
        cause=Cause.MALFORMED if "label" in row else Cause.MISSING,
    )
