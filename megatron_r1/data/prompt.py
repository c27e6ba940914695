"""A prompt, and what identifies it: the text of its question, or its text and its fields."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from r1_grading.rewards import ENVIRONMENT

from megatron_r1.data.chats import Message


@dataclass(frozen=True)
class Prompt:
    """A question with its truth, and how it is sampled and graded.

    Attributes:
        id: hash of the question's text, for an environment of text and fields; the same in all
            runs.
        question: the text of the question, as the row has it.
        kind: the reward that grades its responses, by comparison with `truth`.
        truth: what the reward compares a response with, in JSON types; None where it needs none.
        fields: the reward's other arguments, in JSON types.
        location: where the question's row is, as "file:line", if it has one.
        messages_before: the messages of the chat before the question, such as the system's.
    """

    id: str
    question: str
    kind: str
    truth: Any
    fields: dict[str, Any] = field(default_factory=dict)
    location: str = field(default="", compare=False, repr=False)
    messages_before: list[Message] = field(default_factory=list)

    @property
    def data_source(self) -> str:
        """What the row says of its data source, or ""."""
        return data_source(self.fields)


SOURCE_FIELDS = ("data_source", "source", "dataset")
"""Fields of a row that name its data source, the first that is there."""


def data_source(fields: Mapping[str, Any]) -> str:
    """Return the data source that a row's fields name, or ""."""
    sources = (fields[name] for name in SOURCE_FIELDS if isinstance(fields.get(name), str))
    return next(sources, "")


class _ScriptMarks(dict[int, str]):
    """A table for str.translate that puts ^ before each superscript and _ before each subscript;
    entries are computed at their first use. NFKC alone would make `2³` and `23` equal."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.decomposition(chr(code)).partition(" ")[0]
        self[code] = {"<super>": "^", "<sub>": "_"}.get(kind, "") + chr(code)
        return self[code]


SCRIPTS = _ScriptMarks()


def make_prompt(question: str, kind: str, truth: Any, fields: dict[str, Any]) -> Prompt:
    """Return a prompt whose id is a hash of its normalized question.

    Args:
        question: the question's text.
        kind: the reward that grades it.
        truth: what the reward compares with.
        fields: the row's other columns."""
    return Prompt(question_digest(question).hex()[:16], question, kind, truth, fields)


def normalize_question(question: str, fold_case: bool = True) -> str:
    """Return the text that spellings of one question share: NFKC, folded case, single spaces.
    Superscripts and subscripts are kept apart from plain characters: `2³` becomes `2^3`."""
    normalized_text = unicodedata.normalize("NFKC", question.translate(SCRIPTS))
    return " ".join((normalized_text.casefold() if fold_case else normalized_text).split())


def is_heldout(question: str, fraction: float, salt: str = "") -> bool:
    """Return whether a question belongs to the held-out share, by its text alone.

    Args:
        question: the question's text.
        fraction: the share that is held out.
        salt: makes the share independent of the shares of other salts. Without a salt of its own, a
            reward model whose pairs have a policy's questions would find all of them on one side.
    """
    return int.from_bytes(question_digest(salt + question)[-8:], "big") < fraction * 2**64


def conversation_text(prompt: Prompt) -> str:
    """Return the text of the question and of the turns before it, but for a system's."""
    turns = [m["content"] for m in prompt.messages_before if m["role"] != "system"]
    return "\n".join([*turns, prompt.question])


def prompt_identity(prompt: Prompt, kind: str | None) -> str:
    """Return the text that identifies a prompt.

    Args:
        prompt: the question, with the turns before it and the fields of its row.
        kind: as in `load_prompts`."""
    question = conversation_text(prompt)
    if kind != ENVIRONMENT or not prompt.fields:
        return question
    text = json.dumps(prompt.fields, sort_keys=True, default=str)
    # As a hash, because `normalize_question` would make fields equal.
    return f"{question} {hashlib.sha256(text.encode()).hexdigest()}"


def question_digest(question: str) -> bytes:
    """Return the hash of the normalized question."""
    return hashlib.sha256(normalize_question(question).encode("utf-8", "replace")).digest()
