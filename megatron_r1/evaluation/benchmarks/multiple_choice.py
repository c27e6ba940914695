"""Multiple-choice questions, whose truth is a letter."""

import random
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = (
    "Answer the following multiple choice question. Please reason step by step, and put only "
    "the letter of your final answer within \\boxed{}.\n\n{problem}"
)


def lettered(problem: str, choices: Sequence[str]) -> str:
    """Return the problem with its choices as "A) …" lines."""
    lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([problem, "", *lines])


def shuffled(choices: Sequence[str], key: str) -> tuple[list[str], str]:
    """Return the choices in an order that depends on `key` alone, and the letter of the first."""
    order = list(range(len(choices)))
    random.Random(key).shuffle(order)
    return [choices[index] for index in order], LETTERS[order.index(0)]
