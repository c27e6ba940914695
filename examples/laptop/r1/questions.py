"""The questions of every stage, and responses written by people.

reasoning.jsonl, talk.jsonl: questions for `data.path`, including those that `heldout_fraction`
holds out; heldout/: the held-out ones; all.jsonl: equally many of both kinds, without held-out
ones; shots.jsonl: worked examples for few-shot prompts; replies.jsonl: right replies to questions
without reasoning, for `sft`, as the paper takes them from DeepSeek-V3's own data. Not all of these
are the replies that people prefer."""

import random
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from examples.laptop.r1.corpus import document, is_heldout_lesson
from examples.laptop.r1.lessons import Lesson, facts, plain, programs, respond, risks, sisters, sums
from megatron_r1.base.files.json_lines import write_lines

SEED = 1_000_003
"""Not the corpus's seed. Questions are held out by their text, so the seed does not matter."""
SHOTS = 2
"""Worked examples of each subject in each language."""


def write(folder: str, sums_: int = 1200, sisters_: int = 500, programs_: int = 500) -> None:
    """Write the files; the counts are of different questions, each in both languages."""
    out = Path(folder)
    reasoning = [*chain(sums(sums_, SEED), sisters(sisters_, SEED), programs(programs_, SEED))]
    talk = [*chain(facts(), risks())]
    for name, lessons in (("reasoning", reasoning), ("talk", talk)):
        random.Random(name).shuffle(lessons)
        write_lines(out / f"{name}.jsonl", (lesson.row for lesson in lessons))
        hidden = [lesson.row for lesson in lessons if is_heldout_lesson(lesson)]
        write_lines(out / "heldout" / f"{name}.jsonl", hidden)
    reasoning, talk = ([x for x in both if not is_heldout_lesson(x)] for both in (reasoning, talk))
    draw = random.Random("all")
    both = [lesson.row for lesson in reasoning[: len(talk)] + talk]
    write_lines(out / "all.jsonl", draw.sample(both, len(both)))
    shots = (
        {"question": x.question, "response": _in_own_words(x, x.answer)["response"]}
        for x in _some_of_each(reasoning)
    )
    write_lines(out / "shots.jsonl", shots)
    write_lines(out / "replies.jsonl", (_in_own_words(x, plain(x, draw)) for x in talk))


def _some_of_each(lessons: list[Lesson]) -> Iterable[Lesson]:
    groups: dict[tuple[str, str], list[Lesson]] = {}
    for lesson in lessons:
        groups.setdefault((lesson.subject, lesson.language), []).append(lesson)
    return chain.from_iterable(group[:SHOTS] for group in groups.values())


def _in_own_words(lesson: Lesson, answer: str) -> dict[str, str]:
    """Return the response with its thought in the language of the question."""
    thought = "\n".join(line[lesson.language] for line in lesson.lines)
    return document(lesson, respond(thought, answer))
