"""A lesson: a question in one of two languages with a thought, the right answer and wrong ones."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LANGUAGES = ("en", "zh")
NAMES = (
    *("Mary", "Patricia", "Jennifer", "Linda", "Elizabeth", "Barbara", "Susan", "Jessica"),
    *("Sarah", "Margaret", "Alice", "James", "John", "Robert", "Michael", "William"),
    *("David", "Richard", "Joseph", "Thomas", "Charles", "Bob"),
)
"""The names of reasoning-gym's `aiw`."""

Line = dict[str, str]
"""A line of a thought, by language."""


@dataclass(frozen=True)
class Lesson:
    """A question with the thought that leads to its answer. language: of the question. lines: its
    thought. wrong: draws a plausible wrong answer. kind, truth, fields: the reward's inputs, as in
    a row of questions."""

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
        """The row for `data.path`. target: the language that the thought should have."""
        facts = {"question": self.question, "kind": self.kind, "truth": self.truth}
        return facts | self.fields | {"target": self.language, "subject": self.subject}


def respond(thought: str, answer: str) -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"
