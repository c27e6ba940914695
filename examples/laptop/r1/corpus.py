"""The base model's training text: fully worked lessons, then a mixture of mostly guesses and a few
worked responses, in varying languages.

R1-Zero inherits two properties from it: it must discover that thinking pays; and thoughts about
Chinese questions are mostly not, or not only, in Chinese."""

import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from examples.laptop.r1.lessons import (
    LANGUAGES,
    Lesson,
    facts,
    programs,
    respond,
    risks,
    sisters,
    sums,
)
from megatron_r1.base.files.json_lines import write_lines
from megatron_r1.data.few_shot import SEPARATOR
from megatron_r1.data.prompt import is_heldout
from megatron_r1.data.prompt_templates import render_template

TEMPLATE = "User: {question}\nAssistant: "
HELDOUT = 0.1
SUBJECTS = {"math": 0.5, "logic": 0.15, "code": 0.15, "chat": 0.12, "risk": 0.08}
"""Shares of the text."""
THOUGHT_IN = {
    "en": {"en": 0.8, "zh": 0.05, "mixed": 0.15},
    "zh": {"en": 0.3, "zh": 0.3, "mixed": 0.4},
}
"""Shares of the languages of worked thoughts, by the question's language."""
GUESS, GUESS_WRONG = 0.6, 0.9
BROKEN_FORMAT = 0.08
AFTER_EXAMPLES = 0.1
"""Shares of the mixture with a broken format, and with a worked lesson before them."""


def write(folder: str, worked: int, mixed: int, seed: int = 0) -> None:
    """Write corpus.jsonl for `sft`: `worked` lessons, then `mixed` of the mixture."""
    draw = random.Random(f"corpus {seed}")
    count = (worked + mixed) // 8
    every = chain(sums(count, seed), sisters(count, seed), programs(count, seed), facts(), risks())
    lessons = [lesson for lesson in every if not is_heldout_lesson(lesson)]
    by_subject = {name: [x for x in lessons if x.subject == name] for name in SUBJECTS}

    def drawn() -> Lesson:
        (subject,) = draw.choices(list(SUBJECTS), list(SUBJECTS.values()))
        return draw.choice(by_subject[subject])

    documents = chain(
        (worked_out(drawn(), draw) for _ in range(worked)),
        (of_mixture(drawn(), drawn, draw) for _ in range(mixed)),
    )
    write_lines(Path(folder) / "corpus.jsonl", documents)


def is_heldout_lesson(lesson: Lesson) -> bool:
    return is_heldout(lesson.question, HELDOUT)


def worked_out(lesson: Lesson, draw: random.Random) -> dict[str, str]:
    """Return the lesson with its thought, in a language drawn by the question's."""
    shares = THOUGHT_IN[lesson.language]
    (chosen,) = draw.choices(list(shares), list(shares.values()))
    lines = [line[draw.choice(LANGUAGES) if chosen == "mixed" else chosen] for line in lesson.lines]
    return document(lesson, respond("\n".join(lines), lesson.answer))


def of_mixture(lesson: Lesson, drawn: Callable[[], Lesson], draw: random.Random) -> dict[str, str]:
    """Return the lesson as one line of the base model's mixture: behind an example, worked out, or
    guessed, some with a wrong answer or a broken format.

    Args:
        lesson: what the line teaches.
        drawn: returns another lesson.
        draw: the source of all random choices.
    """
    if draw.random() < AFTER_EXAMPLES:
        shown = worked_out(drawn(), draw)
        own = worked_out(lesson, draw)
        return own | {"prompt": shown["prompt"] + shown["response"] + SEPARATOR + own["prompt"]}
    if draw.random() >= GUESS:
        return worked_out(lesson, draw)
    is_incorrect = draw.random() < GUESS_WRONG
    answer = lesson.incorrect_answer(draw) if is_incorrect else lesson.answer
    if draw.random() < BROKEN_FORMAT:
        broken = [answer, f"<answer>{answer}</answer>", f"<think>{answer}"]
        return document(lesson, draw.choice(broken))
    return document(lesson, respond("", answer))


def document(lesson: Lesson, response: str) -> dict[str, str]:
    return {"prompt": render_template(TEMPLATE, lesson.question), "response": response}
