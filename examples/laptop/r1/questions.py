"""What each stage asks, and what people wrote for it.

reasoning.jsonl, talk.jsonl: questions for `data.path`, those that `heldout_fraction` holds out
included; heldout/: these alone; all.jsonl: both kinds without them, as many of each. shots.jsonl:
worked examples, for few-shot prompts. replies.jsonl: right replies to what is no reasoning, for
`sft`, as the paper takes them from DeepSeek-V3's own data; not always those that people like best.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from examples.laptop.r1.corpus import document, held_out
from examples.laptop.r1.lesson import Lesson, respond
from examples.laptop.r1.reasoning import programs, sisters, sums
from examples.laptop.r1.talk import facts, plain, risks
from megatron_r1.files import atomic_write

SEED = 1_000_003
"""Apart from the corpus's: what is held out is so by its text, whatever the seed."""
SHOTS = 2
"""Of each subject in each language."""


def write(folder: str, sums_: int = 1200, sisters_: int = 500, programs_: int = 500) -> None:
    """Into `folder`: so many different questions of each kind, each in both languages."""
    place = Path(folder)
    reasoning = [*chain(sums(sums_, SEED), sisters(sisters_, SEED), programs(programs_, SEED))]
    talk = [*chain(facts(), risks())]
    for name, lessons in (("reasoning", reasoning), ("talk", talk)):
        random.Random(name).shuffle(lessons)
        _write(place / f"{name}.jsonl", (lesson.row for lesson in lessons))
        hidden = [lesson.row for lesson in lessons if held_out(lesson)]
        _write(place / "heldout" / f"{name}.jsonl", hidden)
    reasoning, talk = ([x for x in both if not held_out(x)] for both in (reasoning, talk))
    draw = random.Random("all")
    both = [lesson.row for lesson in reasoning[: len(talk)] + talk]
    _write(place / "all.jsonl", draw.sample(both, len(both)))
    _write(place / "shots.jsonl", map(_shot, _some_of_each(reasoning)))
    _write(place / "replies.jsonl", (_in_own_words(x, plain(x, draw)) for x in talk))


def _some_of_each(lessons: list[Lesson]) -> Iterable[Lesson]:
    groups: dict[tuple[str, str], list[Lesson]] = {}
    for lesson in lessons:
        groups.setdefault((lesson.subject, lesson.language), []).append(lesson)
    return chain.from_iterable(group[:SHOTS] for group in groups.values())


def _shot(lesson: Lesson) -> dict[str, str]:
    worked = _in_own_words(lesson, lesson.answer)
    return {"question": lesson.question, "response": worked["response"]}


def _in_own_words(lesson: Lesson, answer: str) -> dict[str, str]:
    """Worked out in the language of the question."""
    thought = "\n".join(line[lesson.language] for line in lesson.lines)
    return document(lesson, respond(thought, answer))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
