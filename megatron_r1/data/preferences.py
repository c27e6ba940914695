"""Training data of reward models: pairs of responses to a question, or labelled responses."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_r1.data.chats import Message, read_chat, read_transcript
from megatron_r1.data.records import Record, read_records, require_text
from megatron_r1.errors import Cause, UserError

Kind = Literal["pairwise", "pointwise"]


@dataclass(frozen=True)
class Preference:
    """One row: responses to a question, each with its label; of a pair, the better one first.
    opened: whether the prompt ended with `<think>`, which the responses then do not repeat.
    location: "file:line" of the row."""

    question: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    opened: bool
    location: str


def read_preferences(path: str | Path, kind: Kind) -> Iterator[Preference]:
    """Yield the rows of a JSONL or Parquet file: {"question", "chosen", "rejected"} for pairwise,
    {"question", "response", "label"} for pointwise, label 1 or true for a good response, 0 or false
    for a bad one. "prompt" is read where "question" is missing; "opened" is false by default. A
    pair may be two chats, or two transcripts, of one question.

    Raises UserError with file and line for a bad row."""
    for location, row in read_records(path):
        row = _of_chats(location, row) if kind == "pairwise" else row
        question = require_text(location, row, "prompt" if "question" not in row else "question")
        opened = row.get("opened", False)
        if not isinstance(opened, bool):
            raise UserError(
                f"{location}: 'opened' must be true or false, it is {opened!r}",
                key="opened",
                cause=Cause.MALFORMED,
            )
        if kind == "pairwise":
            responses = tuple(require_text(location, row, name) for name in ("chosen", "rejected"))
            if responses[0] == responses[1]:
                raise UserError(
                    f"{location}: 'chosen' and 'rejected' are the same text",
                    key="rejected",
                    cause=Cause.DUPLICATE,
                )
            labels: tuple[float, ...] = (1.0, 0.0)
        else:
            responses, labels = (require_text(location, row, "response"),), (_label(location, row),)
        yield Preference(question, responses, labels, opened, location)


def _of_chats(location: str, row: Record) -> Record:
    """Return the row with question and responses as text, where the pair is one of chats. Raises
    UserError for chats that differ before the last message, and for several turns."""
    chosen, rejected = _chat(row.get("chosen")), _chat(row.get("rejected"))
    if chosen is None or rejected is None:
        return row
    *before, last = chosen
    is_pair = last["role"] == rejected[-1]["role"] == "assistant" and before == rejected[:-1]
    given = next((row[name] for name in ("question", "prompt") if row.get(name)), None)
    if is_pair and not before and isinstance(given, str):
        before = [{"role": "user", "content": given}]
    asked = [message for message in before if message["role"] != "system"]
    if not is_pair or [message["role"] for message in asked] != ["user"]:
        raise UserError(
            f"{location}: 'chosen' and 'rejected' must answer the same one question: chats of a "
            "user's message, a system's before it or not, and the assistant's; shorten the chats",
            key="chosen",
            cause=Cause.MALFORMED,
        )
    question = "\n\n".join(message["content"] for message in before)
    return {**row, "question": question, "chosen": last["content"]} | {
        "rejected": rejected[-1]["content"]
    }


def _chat(value: Any) -> list[Message] | None:
    try:
        return read_chat(value) or read_transcript(value)
    except ValueError:
        return None


def _label(location: str, row: Record) -> float:
    label: Any = row.get("label")
    if isinstance(label, int | float) and label in (0, 1):  # booleans are integers
        return float(label)
    actual = f"is {label!r}" if "label" in row else f"is missing (has {', '.join(row)})"
    raise UserError(
        f"{location}: 'label' must be 1 or true for a good response, else 0; it {actual}",
        key="label",
        cause=Cause.MALFORMED if "label" in row else Cause.MISSING,
    )
