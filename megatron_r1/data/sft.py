"""Supervised examples: a text to continue, or a conversation whose assistant's turns are learned;
files of them, mixed in every epoch, each with its count, repeats or share.

| row | read as |
|---|---|
| `{prompt, response}` or `{prompt, completion}` as text | text, template included |
| `{prompt, completion}` as lists of messages | a conversation; the completion is learned |
| `messages`, `conversations` (ShareGPT) and the like, with `tools` | a conversation |
| `{instruction, input, output}` (Alpaca) | a conversation of two messages |
| `{query, answers, tools}` (xlam) | a conversation; the answer is its calls |
| `{question or problem, response, solution or answer}` | a conversation of two messages |
| `{text}` | text without a prompt, learned from its second token on |"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.sft import MixturePart
from megatron_r1.data.chats import (
    Message,
    read_chat,
    read_system_prompt,
    read_tools,
    read_transcript,
    tool_calls,
)
from megatron_r1.data.renamed_rows import DataReport, RenamedRow, read_renamed_rows, require_text
from megatron_r1.data.row_filter import Conditions, RowFilter
from megatron_r1.data.sampler import EpochSampler

COLUMNS = "in sft.data, beside path, columns"
CHATS = (
    *("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "contents",
)
QUESTIONS = (
    *("question", "problem", "query", "instruction", "prompt", "input", "user", "human"),
    "user_prompt",
)
RESPONSES = (
    *("response", "completion", "generated_solution", "output", "answer", "solution"),
    *("generation", "reasoning", "assistant", "bot", "gpt"),
)


@dataclass(frozen=True)
class SFTExample:
    """One example of supervised training: a text to continue, or a conversation.

    Attributes:
        prompt: the text the model is given, template included, without loss.
        response: with loss.
        messages: the conversation in place of both; its assistant's messages from number
            `learned_from` on have loss.
        learned_from: index of the message from which on the assistant's messages have loss.
        tools: what a conversation's template is given as tools.
        location: "file:line" of the row, for errors.
    """

    prompt: str = ""
    response: str = ""
    messages: list[Message] = field(default_factory=list)
    learned_from: int = 0
    tools: list[Any] | None = None
    location: str = field(default="", compare=False, repr=False)


def load_examples(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: Conditions | None = None,
    report: DataReport | None = None,
) -> list[SFTExample]:
    """Return the examples of a file or data set (`read_renamed_rows`), one a row, in the forms
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
        for location, row in read_renamed_rows(path, columns, names, "sft.data", row_filter.keeps)
    ]
    row_filter.finish()
    if not examples:
        raise UserError(
            f"{path}: it holds no examples; give rows of {{prompt, response}} or {{messages}}",
            key="sft.data",
            cause=Cause.EMPTY,
        )
    return examples


def read_example(location: str, row: RenamedRow, report: DataReport | None = None) -> SFTExample:
    """Return the example that a row states, in any of the forms of `sft.data`.

    Args:
        location: "file:line".
        row: the row, under our names.
        report: counts the forms; None: nothing does.

    Raises:
        UserError: the row has no known form."""
    for form, read in FORMS:
        try:
            example = read(row)
        except ValueError as error:
            raise UserError(
                f"{location}: {form}: {error}", key=form, cause=Cause.MALFORMED
            ) from None
        if example is not None:
            if report is not None:
                report.kinds[form] = report.kinds.get(form, 0) + 1
            return SFTExample(*example, location=location)
    prompt, response = (
        require_text(location, row, name, COLUMNS) for name in ("prompt", "response")
    )
    return SFTExample(prompt, response, location=location)


def find_form(row: RenamedRow) -> str | None:
    """Return which form of `FORMS` a row has; None for none, and for one that is malformed."""
    try:
        return next((form for form, read in FORMS if read(row) is not None), None)
    except ValueError:
        return None


class ExampleSampler(EpochSampler[SFTExample]):
    """Draws examples; a state is refused after an example has changed."""

    def key(self, item: SFTExample) -> str:
        """Return what tells one example from others: its messages, or prompt and response."""
        if item.messages:
            return json.dumps([item.messages, item.learned_from, item.tools], sort_keys=True)
        return f"{item.prompt}\0{item.response}"


Parts = tuple[str, str, list[Message], int, list[Any] | None]
"""The fields of an example."""


def _texts(row: RenamedRow) -> Parts | None:
    """Read {prompt, response} and {prompt, completion} as text."""
    response = row.get("response") or row.get("completion")
    if not isinstance(row.get("prompt"), str) or not isinstance(response, str):
        return None
    if read_chat(row["prompt"]) or not row["prompt"].strip() or not response.strip():
        return None
    return row["prompt"], response, [], 0, None


def _prompt_and_completion(row: RenamedRow) -> Parts | None:
    """Read {prompt or input, completion} as lists of messages; a text next to a list is one
    message."""
    given = row["prompt"] if row.get("prompt") is not None else row.get("input")
    learned = row.get("completion") or row.get("response") or row.get("output")
    before, after = read_chat(given), read_chat(learned)
    if before is None and after is None:
        return None
    if before is None and isinstance(given, str):
        before = [{"role": "user", "content": given}]
    if after is None and isinstance(learned, str):
        after = [{"role": "assistant", "content": learned}]
    if not before or not after:
        return None
    return _conversation([*before, *after], len(before), row)


def _chat(row: RenamedRow) -> Parts | None:
    """Read a conversation, of the first column of `CHATS` that has one."""
    for name in CHATS:
        messages = read_chat(row.get(name)) or read_transcript(row.get(name))
        if messages:
            return _conversation(messages, 0, row)
    return None


def _alpaca(row: RenamedRow) -> Parts | None:
    instruction, output = row.get("instruction"), row.get("output") or row.get("response")
    if not isinstance(instruction, str) or not isinstance(output, str) or not output.strip():
        return None
    given = row.get("input") or row.get("context")
    more = f"\n\n{given}" if isinstance(given, str) and given.strip() else ""
    return _question_parts(instruction + more, output, row)


def _calls(row: RenamedRow) -> Parts | None:
    if not isinstance(row.get("query"), str) or not row.get("tools") or not row.get("answers"):
        return None
    answer = {"role": "assistant", "content": "", "tool_calls": tool_calls(row["answers"])}
    return _conversation([{"role": "user", "content": row["query"]}, answer], 0, row)


def _question_and_response(row: RenamedRow) -> Parts | None:
    question = next((row[n] for n in QUESTIONS if isinstance(row.get(n), str)), None)
    response = next((row[n] for n in RESPONSES if isinstance(row.get(n), str)), None)
    if not question or not response or ("prompt" in row and "response" in row):
        return None
    if not question.strip() or not response.strip() or row.get("prompt") == question:
        return None
    return _question_parts(question, response, row)


def _text(row: RenamedRow) -> Parts | None:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip() or "prompt" in row:
        return None
    return "", text, [], 0, None


def is_learned(message: Message) -> bool:
    """Return whether a message is the assistant's and not excluded by `weight: 0`, as OpenAI's form
    of fine-tuning data excludes it."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _question_parts(question: str, response: str, row: RenamedRow) -> Parts:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return _conversation(turns, 0, row)


def _conversation(messages: list[Message], learned_from: int, row: RenamedRow) -> Parts:
    """Return the example of a conversation, with the row's system prompt where the messages have
    none.

    Raises:
        ValueError: no message is learned.
    """
    system = read_system_prompt(row)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        learned_from += 1
    learned = [message for message in messages[learned_from:] if is_learned(message)]
    if not learned:
        raise ValueError("no message of the assistant, from whose messages is learned")
    if not any(m["content"].strip() or "tool_calls" in m for m in learned):
        raise ValueError("the assistant's messages are empty")
    if messages[0]["role"] == "assistant" and len(messages) == 1:
        raise ValueError("the only message is the assistant's; it has no prompt")
    tools = read_tools(row.get("tools") or row.get("functions"))
    return "", "", messages, learned_from, tools


ALWAYS_LEARNED = (
    *("prompt and completion as messages", "query, answers and tools"),
    "instruction, input and output",
)
"""Forms whose rows are examples, whatever else they have."""
FORMS: tuple[tuple[str, Callable[[RenamedRow], Parts | None]], ...] = (
    ("prompt and response as text", _texts),
    ("prompt and completion as messages", _prompt_and_completion),
    ("messages", _chat),
    ("query, answers and tools", _calls),
    ("instruction, input and output", _alpaca),
    ("question and response", _question_and_response),
    ("text", _text),
)
"""(what the form is called, how it is read)"""


@dataclass(frozen=True)
class LoadedPart:
    """The examples of one file.

    Attributes:
        path: the file.
        examples: all of its examples.
        num_per_epoch: how many of them an epoch has, repeats counted.
        report: the counts of its rows."""

    path: str
    examples: list[SFTExample]
    num_per_epoch: int
    report: DataReport = field(default_factory=DataReport)


def load_mixture(parts: Sequence[MixturePart]) -> list[LoadedPart]:
    """Read every file of a mixture.

    DeepSeek-R1's last supervised stage mixes 600k examples of reasoning and 200k others, for two
    epochs (arXiv 2501.12948).

    Raises:
        UserError: a bad file, or a file too small for its share.
    """
    reports = [DataReport(part.path) for part in parts]
    loaded = [
        load_examples(part.path, part.columns, part.where, report)
        for part, report in zip(parts, reports, strict=True)
    ]
    counts = epoch_counts(parts, [len(examples) for examples in loaded])
    files = (part.path for part in parts)
    return [LoadedPart(*part) for part in zip(files, loaded, counts, reports, strict=True)]


def epoch_counts(parts: Sequence[MixturePart], sizes: Sequence[int]) -> list[int]:
    """Return how many examples of each part an epoch has.

    Shares are of the whole epoch. Parts with a count or repeat fix its size; if all parts have
    shares, it is the largest epoch that repeats nothing. Examples beyond a file's share come up in
    later epochs.

    Args:
        parts: the recipe's entries.
        sizes: the number of examples in each file.

    Raises:
        UserError: a share that would need repeats."""
    fixed = [_fixed_count(part, size) for part, size in zip(parts, sizes, strict=True)]
    shares = [part.share or 0.0 for part in parts]
    if not any(shares):
        return [count or 0 for count in fixed]
    num_fixed = sum(count or 0 for count in fixed)
    if num_fixed:
        total = round(num_fixed / (1 - sum(shares)))
    else:
        # The epsilon: 600 / 0.6 must not become 999.
        total = min(
            math.floor(size / share + 1e-6) for size, share in zip(sizes, shares, strict=True)
        )
    by_share = _round_to(total - num_fixed, [share * total for share in shares])
    counts = [n if f is None else f for n, f in zip(by_share, fixed, strict=True)]
    for part, size, count in zip(parts, sizes, counts, strict=True):
        if part.share is not None and count > size:
            raise UserError(
                f"sft.data: {part.path} has {size:,} examples, its share {part.share:g} of an "
                f"epoch of {total:,} are {count:,}; lower the share, or set "
                f"repeat: {count / size:.2f}",
                key="sft.data",
                cause=Cause.TOO_LARGE,
            )
    return counts


class MixtureSampler(ExampleSampler):
    """Draws epochs that have exactly `num_per_epoch` examples of every part.

    Where that is no multiple of the file's size, each epoch has the next examples of the file, so
    that all come up equally often. Order and state are as `EpochSampler`'s; a state is refused
    after a file or a count has changed.

    Args:
        parts: each with the examples of a file and their number in an epoch.
        seed: the seed of all shuffles.
        shuffled: whether the examples of an epoch are mixed.
    """

    def __init__(self, parts: Sequence[LoadedPart], seed: int, shuffled: bool = True) -> None:
        self._counts = [(len(i.examples), i.num_per_epoch) for i in parts]
        examples = [example for i in parts for example in i.examples]
        super().__init__(examples, seed, shuffled)
        content = f"{self._fingerprint}{self._counts}"
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    def _shuffle(self) -> list[int]:
        order: list[int] = []
        start = 0
        for number, (size, count) in enumerate(self._counts):
            indices = list(range(start, start + size))
            num_repeats, num_more = divmod(count, size)
            order += indices * num_repeats
            random.Random(f"{self.seed}/part {number}").shuffle(indices)
            first = self.epoch * num_more
            order += sorted(indices[(first + i) % size] for i in range(num_more))
            start += size
        if self.shuffled:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order


def describe_mixture(parts: Sequence[LoadedPart]) -> list[str]:
    """Return a line about each part, with its share of an epoch."""
    total = sum(i.num_per_epoch for i in parts)
    return [
        f"{i.num_per_epoch:,} examples of {i.path} ({i.num_per_epoch / total:.1%} of an epoch; it "
        f"has {len(i.examples):,})"
        for i in parts
    ]


def _fixed_count(part: MixturePart, size: int) -> int | None:
    if part.share is not None:
        return None
    return part.count or max(1, round(size * (part.repeat or 1.0)))


def _round_to(total: int, exact: Sequence[float]) -> list[int]:
    """Round `exact` to integers whose sum is `total`: the largest remainders are rounded up."""
    counts = [math.floor(number + 1e-9) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in [i for i in by_remainder if exact[i]][: total - sum(counts)]:
        counts[i] += 1
    return counts
