"""Questions and what identifies them: the text of a question, or of a question and its fields."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from r1_grading.rewards import ENVIRONMENT

from megatron_r1.data.chats import Message


@dataclass(frozen=True)
class Prompt:
    """A question. id: hash of the question's text, for an environment of text and fields; the same
    in all runs. kind: the reward that grades its responses, by comparison with `truth`. fields: the
    reward's other arguments, in JSON types. before: the messages of the chat before the question,
    such as the system's. location: where the question's row is, as "file:line", if it has one."""

    id: str
    question: str
    kind: str
    truth: Any
    fields: dict[str, Any] = field(default_factory=dict)
    location: str = field(default="", compare=False, repr=False)
    before: list[Message] = field(default_factory=list)


class _ScriptMarks(dict[int, str]):
    """A table for str.translate that puts ^ before each superscript and _ before each subscript;
    entries are computed at their first use. NFKC alone would make `2³` and `23` equal."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.decomposition(chr(code)).partition(" ")[0]
        self[code] = {"<super>": "^", "<sub>": "_"}.get(kind, "") + chr(code)
        return self[code]


SCRIPTS = _ScriptMarks()


def make_prompt(question: str, kind: str, truth: Any, fields: dict[str, Any]) -> Prompt:
    """Return a prompt whose id is a hash of its normalized question."""
    return Prompt(digest(question).hex()[:16], question, kind, truth, fields)


def normalize(question: str, fold_case: bool = True) -> str:
    """Return the text that spellings of one question share: NFKC, folded case, single spaces.
    Superscripts and subscripts are kept apart from plain characters: `2³` becomes `2^3`."""
    plain = unicodedata.normalize("NFKC", question.translate(SCRIPTS))
    return " ".join((plain.casefold() if fold_case else plain).split())


def is_heldout(question: str, fraction: float, salt: str = "") -> bool:
    """Return whether a question belongs to the held-out share, by its text alone. salt: makes the
    share independent of the shares of other salts. Without a salt of its own, a reward model whose
    pairs have a policy's questions would find all of them on one side."""
    return int.from_bytes(digest(salt + question)[-8:], "big") < fraction * 2**64


def asked(prompt: Prompt) -> str:
    """Return the text of the question and of the turns before it, but for a system's."""
    turns = [m["content"] for m in prompt.before if m["role"] != "system"]
    return "\n".join([*turns, prompt.question])


def identity(prompt: Prompt, kind: str | None) -> str:
    """Return the text that identifies a prompt. kind: as in `load_prompts`."""
    question = asked(prompt)
    if kind != ENVIRONMENT or not prompt.fields:
        return question
    text = json.dumps(prompt.fields, sort_keys=True, default=str)
    # As a hash, because `normalize` would make fields equal.
    return f"{question} {hashlib.sha256(text.encode()).hexdigest()}"


def digest(question: str) -> bytes:
    """Return the hash of the normalized question."""
    return hashlib.sha256(normalize(question).encode("utf-8", "replace")).digest()
