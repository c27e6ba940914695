"""What both systems are given: model, questions, limits, and how much of an algorithm."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """One setting. A step: `questions` x `group` answers of at most `limit` tokens, then
    `minibatches` updates in fp32. kl_beta: weight of the KL to a reference model; 0 leaves the
    reference out, on both sides."""

    limit: int
    questions: int = 16
    group: int = 16
    minibatches: int = 1
    kl_beta: float = 0.0
    temperature: float = 1.0
    clip: float = 0.2
    # So small that lengths stay what they are while every step is measured.
    learning_rate: float = 1e-7

    @property
    def answers(self) -> int:
        return self.questions * self.group

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Sums of two to four numbers, as JSONL: prompts of unequal length."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        terms = [
            str(draw.randrange(1, 10 ** draw.randrange(1, 5))) for _ in range(draw.randrange(2, 5))
        ]
        lines.append({"question": f"{' + '.join(terms)} =", "truth": "0", "kind": "parity:grade"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def reward(answer: str) -> float:
    """Costs nothing and differs within a group."""
    return float(len(answer) % 2)
