"""Synthetic data of every kind that a verb reads, and the rule that grades its responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1_grading import Grade

from megatron_r1.base.files.json_lines import write_lines

KIND = f"{__name__}:grade"
NAMED_KIND = f"{__name__}:grade_named"
"""The kind of every other question, instead of the kinds of `rl.kind_weights`."""


def grade(response: str, truth: object, **fields: object) -> Grade:
    """Return reward 1 for a response of an even number of characters. Random weights are right half
    of the time, so that groups have advantages and updates change the weights."""
    is_even = len(response) % 2 == 0
    return Grade(float(is_even), "even length" if is_even else "odd length")


grade_named = grade


def compare(question: str, first: str, second: str) -> float:
    """Vote for the longer response: a judge of preference pairs.

    Args:
        question: the question, which is not read.
        first: a response.
        second: another response."""
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def is_safe(question: str, response: str) -> float:
    """Vote for a response of an even number of characters: a judge of safety labels."""
    return float(len(response) % 2 == 0)


def write_questions(
    path: Path, count: int, other_kinds: Sequence[str] = (), sources: Sequence[str] = ()
) -> None:
    """Write questions with truths, and a target for a recipe that also rewards the language.

    Args:
        path: the file.
        count: the number of questions.
        other_kinds: kinds that take turns with the kind that `grade` grades.
        sources: data sources that take turns with none."""
    kinds, data_sources = [KIND, *other_kinds], ["", *sources]
    rows = (
        {
            "question": f"{i} + {i + 1} =",
            "truth": 2 * i + 1,
            "kind": kinds[i % len(kinds)],
            "target": "en",
            "data_source": data_sources[i % len(data_sources)],
        }
        for i in range(count)
    )
    write_lines(path, rows)


def write_examples(path: Path, count: int, num_words: int) -> None:
    """Write `count` examples of supervised fine-tuning with up to `num_words` words of thought.

    Args:
        path: the file.
        count: the number of examples.
        num_words: the most words of a thought."""
    rows = (
        {
            "prompt": f"{i} + {i + 1} =",
            "response": f"<think>{'count ' * (1 + i * num_words // count)}</think>"
            f"<answer>{2 * i + 1}</answer>",
        }
        for i in range(count)
    )
    write_lines(path, rows)


def write_preferences(path: Path, count: int, kind: str) -> None:
    """Write rows for a reward model.

    Args:
        path: the file.
        count: the number of rows.
        kind: pairwise or pointwise."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        question, right = f"{i} + {i + 1} =", f"The sum is {2 * i + 1}."
        if kind == "pairwise":
            rows.append({"question": question, "chosen": right, "rejected": "I do not know."})
        else:
            rows.append({"question": question, "response": right * (1 + i % 2), "label": i % 2})
    write_lines(path, rows)
