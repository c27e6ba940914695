"""Sums of two numbers of two digits: questions to learn from, others to evaluate, worked examples.
Products of two numbers of four digits, for which the model needs a tool.

python -m examples.smollm2.questions build/smollm2/questions"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.base.files.json_lines import write_lines
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.evaluation.benchmarks.base import Benchmark, Options, Question, Rows

NUM_TRAIN, NUM_HELDOUT, NUM_EXAMPLES = 2000, 200, 256
NUM_PRODUCTS = 100  # held out
MISTAKES = (0, 0, 0, 1, -1, 10)

Pairs = list[tuple[int, int]]


def write(folder: str) -> None:
    """Write train.jsonl and heldout.jsonl, the same every time."""
    for name, pairs in zip(("train", "heldout"), _split_pairs(), strict=True):
        rows = [{"question": f"{a} + {b}", "truth": str(a + b)} for a, b in pairs]
        write_lines(Path(folder) / f"{name}.jsonl", rows)


def write_products(folder: str) -> None:
    """Write train.jsonl and heldout.jsonl with products of two numbers of four digits."""
    draw = random.Random(2)
    seen: set[tuple[int, int]] = set()
    while len(seen) < NUM_TRAIN + NUM_PRODUCTS:
        seen.add((draw.randrange(1000, 10_000), draw.randrange(1000, 10_000)))
    rows = [{"question": f"{a} * {b}", "truth": str(a * b)} for a, b in sorted(seen)]
    draw.shuffle(rows)
    write_lines(Path(folder) / "train.jsonl", rows[:NUM_TRAIN])
    write_lines(Path(folder) / "heldout.jsonl", rows[NUM_TRAIN:])


def write_examples(folder: str, model: str) -> None:
    """Write examples.jsonl: training questions in the chat template of `model`, answered as
    rl.yaml's template shows. Half of the results are wrong: the form is learned, not addition."""
    draw, tokenizer = random.Random(1), PromptTokenizer(model, "chat")
    rows = []
    for a, b in _split_pairs()[0][:NUM_EXAMPLES]:
        result = a + b + draw.choice(MISTAKES)
        rows.append({"prompt": tokenizer.render(f"{a} + {b}"), "response": f"{a} + {b} = {result}"})
    write_lines(Path(folder) / "examples.jsonl", rows)


def _split_pairs() -> tuple[Pairs, Pairs]:
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    chosen = random.Random(0).sample(every, NUM_TRAIN + NUM_HELDOUT)
    return chosen[:NUM_TRAIN], chosen[NUM_TRAIN:]


def _questions_of_rows(rows: Rows, options: Options) -> Iterator[Question]:
    for _, row in rows:
        yield Question("", row["question"], "math", row["truth"])


SUMS = Benchmark(_questions_of_rows, hubs={"examples/smollm2": lambda options: ["heldout.jsonl"]})
"""The benchmark that `eval` reads from a file of `write` or `write_products`, its path."""

if __name__ == "__main__":
    write(sys.argv[1])
