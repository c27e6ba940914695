"""What the small world of this recipe is made of: questions in two languages, each with thoughts
that work it out, its answer, and answers that are wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LANGUAGES = ("en", "zh")
NAMES = (
    "Mary",
    "Patricia",
    "Jennifer",
    "Linda",
    "Elizabeth",
    "Barbara",
    "Susan",
    "Jessica",
    "Sarah",
    "Margaret",
    "Alice",
    "James",
    "John",
    "Robert",
    "Michael",
    "William",
    "David",
    "Richard",
    "Joseph",
    "Thomas",
    "Charles",
    "Bob",
)
"""Those of reasoning-gym's `aiw`."""

Line = dict[str, str]
"""A line of a thought in each language."""


@dataclass(frozen=True)
class Lesson:
    """language: of the question. lines: a thought that works it out. wrong: draws a plausible wrong
    answer. kind, truth, fields: for the reward, as a row of questions has them."""

    subject: str
    language: str
    question: str
    lines: list[Line]
    answer: str
    wrong: Callable[[random.Random], str]
    kind: str
    truth: Any = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """As `data.path` wants it. target: what its thought should be written in."""
        facts = {"question": self.question, "kind": self.kind, "truth": self.truth}
        return facts | self.fields | {"target": self.language, "subject": self.subject}


def respond(thought: str, answer: str) -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"
