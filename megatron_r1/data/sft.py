"""Supervised examples: a text to continue, or a conversation whose assistant's turns are learned.

| row | read as |
|---|---|
| `{prompt, response}` or `{prompt, completion}` as text | text, template included |
| `{prompt, completion}` as lists of messages | a conversation; the completion is learned |
| `messages`, `conversations` (ShareGPT) and the like, with `tools` | a conversation |
| `{instruction, input, output}` (Alpaca) | a conversation of two messages |
| `{query, answers, tools}` (xlam) | a conversation; the answer is its calls |
| `{question or problem, response, solution or answer}` | a conversation of two messages |
| `{text}` | text without a prompt, learned from its second token on |"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import (
    Message,
    read_chat,
    read_system_prompt,
    read_tools,
    read_transcript,
    tool_calls,
)
from megatron_r1.data.data_report import DataReport
from megatron_r1.data.row_filter import Conditions, RowFilter
from megatron_r1.data.rows import CanonicalRow, read_canonical_rows, require_text
from megatron_r1.data.sampler import EpochSampler

COLUMNS_PLACE = "in sft.data, next to path, columns"
CHATS = (
    "messages",
    "conversations",
    "conversation",
    "chat",
    "dialog",
    "dialogue",
    "turns",
    "contents",
)
QUESTION_COLUMNS = (
    "question",
    "problem",
    "query",
    "instruction",
    "prompt",
    "input",
    "user",
    "human",
    "user_prompt",
)
RESPONSE_COLUMNS = (
    "response",
    "completion",
    "generated_solution",
    "output",
    "answer",
    "solution",
    "generation",
    "reasoning",
    "assistant",
    "bot",
    "gpt",
)


@dataclass(frozen=True)
class SFTExample:
    """One example of supervised training: a text to continue, or a conversation.

    Attributes:
        prompt: the text the model is given, template included, without loss.
        response: with loss.
        messages: the conversation in place of both; its assistant's messages from number
            `first_loss_message` on have loss.
        first_loss_message: index of the message from which on the assistant's messages have loss.
        tools: what a conversation's template is given as tools.
        location: "file:line" of the row, for errors.
    """

    prompt: str = ""
    response: str = ""
    messages: list[Message] = field(default_factory=list)
    first_loss_message: int = 0
    tools: list[Any] | None = None
    location: str = field(default="", compare=False, repr=False)


def load_examples(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: Conditions | None = None,
    report: DataReport | None = None,
) -> list[SFTExample]:
    """Return the examples of a file or data set (`read_canonical_rows`), one a row, in the forms
    of this module.

    Args:
        path: a file or data set.
        columns: our name → the file's.
        where: conditions that rows must meet (`row_filter.RowFilter`).
        report: counts the rows.

    Raises:
        UserError: with file and line for a bad row, and for a source without rows.
    """
    report = report or DataReport(str(path))
    row_filter = RowFilter(where or {}, report, "sft.data.where")
    names = ("prompt", "response")
    examples = [
        read_example(location, row, report)
        for location, row in read_canonical_rows(path, columns, names, "sft.data", row_filter.keeps)
    ]
    row_filter.finish()
    if not examples:
        raise UserError(
            f"{path}: it holds no examples; give rows of {{prompt, response}} or {{messages}}",
            key="sft.data",
            cause=Cause.EMPTY,
        )
    return examples


def read_example(location: str, row: CanonicalRow, report: DataReport | None = None) -> SFTExample:
    """Return the example that a row states, in any of the forms of `sft.data`.

    Args:
        location: "file:line".
        row: the row, under our names.
        report: counts the forms; None: nothing does.

    Raises:
        UserError: the row has no known form."""
    for form, read_form in ROW_FORMS:
        try:
            example = read_form(row)
        except ValueError as error:
            raise UserError(
                f"{location}: {form}: {error}", key=form, cause=Cause.MALFORMED
            ) from None
        if example is not None:
            if report is not None:
                report.kinds[form] = report.kinds.get(form, 0) + 1
            return SFTExample(*example, location=location)
    prompt, response = (
        require_text(location, row, name, COLUMNS_PLACE) for name in ("prompt", "response")
    )
    return SFTExample(prompt, response, location=location)


def find_form(row: CanonicalRow) -> str | None:
    """Return which form of `ROW_FORMS` a row has; None for none, and for one that is malformed."""
    try:
        return next((form for form, read_form in ROW_FORMS if read_form(row) is not None), None)
    except ValueError:
        return None


class ExampleSampler(EpochSampler[SFTExample]):
    """Draws examples; a state is refused after an example has changed."""

    def key(self, item: SFTExample) -> str:
        """Return what tells one example from others: its messages, or prompt and response."""
        if item.messages:
            return json.dumps([item.messages, item.first_loss_message, item.tools], sort_keys=True)
        return f"{item.prompt}\0{item.response}"


Parts = tuple[str, str, list[Message], int, list[Any] | None]
"""The fields of an example."""


def _read_text_pair(row: CanonicalRow) -> Parts | None:
    """Read {prompt, response} and {prompt, completion} as text."""
    response = row.get("response") or row.get("completion")
    if not isinstance(row.get("prompt"), str) or not isinstance(response, str):
        return None
    if read_chat(row["prompt"]) or not row["prompt"].strip() or not response.strip():
        return None
    return row["prompt"], response, [], 0, None


def _read_prompt_and_completion(row: CanonicalRow) -> Parts | None:
    """Read {prompt or input, completion} as lists of messages; a text next to a list is one
    message."""
    prompt = row["prompt"] if row.get("prompt") is not None else row.get("input")
    completion = row.get("completion") or row.get("response") or row.get("output")
    prompt_messages, completion_messages = read_chat(prompt), read_chat(completion)
    if prompt_messages is None and completion_messages is None:
        return None
    if prompt_messages is None and isinstance(prompt, str):
        prompt_messages = [{"role": "user", "content": prompt}]
    if completion_messages is None and isinstance(completion, str):
        completion_messages = [{"role": "assistant", "content": completion}]
    if not prompt_messages or not completion_messages:
        return None
    return _conversation_parts([*prompt_messages, *completion_messages], len(prompt_messages), row)


def _read_conversation(row: CanonicalRow) -> Parts | None:
    """Read a conversation, of the first column of `CHATS` that has one."""
    for name in CHATS:
        messages = read_chat(row.get(name)) or read_transcript(row.get(name))
        if messages:
            return _conversation_parts(messages, 0, row)
    return None


def _read_alpaca(row: CanonicalRow) -> Parts | None:
    instruction, output = row.get("instruction"), row.get("output") or row.get("response")
    if not isinstance(instruction, str) or not isinstance(output, str) or not output.strip():
        return None
    context = row.get("input") or row.get("context")
    suffix = f"\n\n{context}" if isinstance(context, str) and context.strip() else ""
    return _question_parts(instruction + suffix, output, row)


def _read_calls(row: CanonicalRow) -> Parts | None:
    if not isinstance(row.get("query"), str) or not row.get("tools") or not row.get("answers"):
        return None
    answer = {"role": "assistant", "content": "", "tool_calls": tool_calls(row["answers"])}
    return _conversation_parts([{"role": "user", "content": row["query"]}, answer], 0, row)


def _read_question_and_response(row: CanonicalRow) -> Parts | None:
    question = next((row[n] for n in QUESTION_COLUMNS if isinstance(row.get(n), str)), None)
    response = next((row[n] for n in RESPONSE_COLUMNS if isinstance(row.get(n), str)), None)
    if not question or not response or ("prompt" in row and "response" in row):
        return None
    if not question.strip() or not response.strip() or row.get("prompt") == question:
        return None
    return _question_parts(question, response, row)


def _read_text(row: CanonicalRow) -> Parts | None:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip() or "prompt" in row:
        return None
    return "", text, [], 0, None


def has_loss(message: Message) -> bool:
    """Return whether a message is the assistant's and not excluded by `weight: 0`, as OpenAI's form
    of fine-tuning data excludes it."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _question_parts(question: str, response: str, row: CanonicalRow) -> Parts:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return _conversation_parts(turns, 0, row)


def _conversation_parts(
    messages: list[Message], first_loss_message: int, row: CanonicalRow
) -> Parts:
    """Return the example of a conversation, with the row's system prompt where the messages have
    none.

    Raises:
        ValueError: no message is learned.
    """
    system = read_system_prompt(row)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        first_loss_message += 1
    learned_messages = [message for message in messages[first_loss_message:] if has_loss(message)]
    if not learned_messages:
        raise ValueError("no message of the assistant, from whose messages is learned")
    if not any(m["content"].strip() or "tool_calls" in m for m in learned_messages):
        raise ValueError("the assistant's messages are empty")
    if messages[0]["role"] == "assistant" and len(messages) == 1:
        raise ValueError("the only message is the assistant's; it has no prompt")
    tools = read_tools(row.get("tools") or row.get("functions"))
    return "", "", messages, first_loss_message, tools


ALWAYS_LEARNED = (
    "prompt and completion as messages",
    "query, answers and tools",
    "instruction, input and output",
)
"""Forms whose rows are examples, whatever else they have."""
ROW_FORMS: tuple[tuple[str, Callable[[CanonicalRow], Parts | None]], ...] = (
    ("prompt and response as text", _read_text_pair),
    ("prompt and completion as messages", _read_prompt_and_completion),
    ("messages", _read_conversation),
    ("query, answers and tools", _read_calls),
    ("instruction, input and output", _read_alpaca),
    ("question and response", _read_question_and_response),
    ("text", _read_text),
)
"""(what the form is called, how it is read)"""
