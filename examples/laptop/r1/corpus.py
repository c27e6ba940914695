"""The base model's reading: schoolwork in which everything is worked out, then how people write -
mostly guesses, seldom worked out, in whichever language comes to mind.

What R1-Zero inherits from it: that thinking pays is to be found out; and for questions in Chinese
the careful thoughts are mostly not, or not only, in Chinese.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from examples.laptop.r1.lesson import LANGUAGES, Lesson, respond
from examples.laptop.r1.reasoning import programs, sisters, sums
from examples.laptop.r1.talk import facts, risks
from megatron_r1.data.prompts import is_heldout
from megatron_r1.data.shots import BETWEEN
from megatron_r1.data.templates import render
from megatron_r1.files import atomic_write

TEMPLATE = "User: {problem}\nAssistant: "
HELDOUT = 0.1
SUBJECTS = {"math": 0.5, "logic": 0.15, "code": 0.15, "chat": 0.12, "risk": 0.08}
"""Their shares of the reading."""
THOUGHT_IN = {
    "en": {"en": 0.8, "zh": 0.05, "mixed": 0.15},
    "zh": {"en": 0.3, "zh": 0.3, "mixed": 0.4},
}
"""By the question's language: shares of the worked thoughts'."""
GUESS, GUESS_WRONG = 0.6, 0.9
BROKEN_FORMAT = 0.08
AFTER_EXAMPLES = 0.1
"""Of what people write: shares with a broken format, and of lessons that follow a worked one."""


def write(folder: str, worked: int, mixed: int, seed: int = 0) -> None:
    """corpus.jsonl, for `sft`: `worked` lessons, then `mixed` of the mixture."""
    draw = random.Random(f"corpus {seed}")
    lessons = [lesson for lesson in every_lesson(worked + mixed, seed) if not held_out(lesson)]
    by_subject = {name: [x for x in lessons if x.subject == name] for name in SUBJECTS}

    def drawn() -> Lesson:
        (subject,) = draw.choices(list(SUBJECTS), SUBJECTS.values())
        return draw.choice(by_subject[subject])

    documents = chain(
        (worked_out(drawn(), draw) for _ in range(worked)),
        (as_people_write(drawn(), drawn, draw) for _ in range(mixed)),
    )
    text = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    atomic_write(Path(folder) / "corpus.jsonl", text)


def every_lesson(count: int, seed: int) -> Iterator[Lesson]:
    yield from chain(sums(count // 8, seed), sisters(count // 8, seed), programs(count // 8, seed))
    yield from chain(facts(), risks())


def held_out(lesson: Lesson) -> bool:
    return is_heldout(lesson.question, HELDOUT)


def worked_out(lesson: Lesson, draw: random.Random) -> dict[str, str]:
    """With its thought, in a language that depends on the question's."""
    shares = THOUGHT_IN[lesson.language]
    (chosen,) = draw.choices(list(shares), shares.values())
    lines = [line[draw.choice(LANGUAGES) if chosen == "mixed" else chosen] for line in lesson.lines]
    return document(lesson, respond("\n".join(lines), lesson.answer))


def as_people_write(
    lesson: Lesson, drawn: Callable[[], Lesson], draw: random.Random
) -> dict[str, str]:
    if draw.random() < AFTER_EXAMPLES:
        shown = worked_out(drawn(), draw)
        own = worked_out(lesson, draw)
        return own | {"prompt": shown["prompt"] + shown["response"] + BETWEEN + own["prompt"]}
    if draw.random() >= GUESS:
        return worked_out(lesson, draw)
    wrong = draw.random() < GUESS_WRONG
    answer = lesson.wrong(draw) if wrong else lesson.answer
    if draw.random() < BROKEN_FORMAT:
        return document(
            lesson, draw.choice([answer, f"<answer>{answer}</answer>", f"<think>{answer}"])
        )
    return document(lesson, respond("", answer))


def document(lesson: Lesson, response: str) -> dict[str, str]:
    return {"prompt": render(TEMPLATE, lesson.question), "response": response}
