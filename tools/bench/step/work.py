"""The work of both systems: questions, limits, reward, and the part of the algorithm they share."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """One setting. A step samples `questions` x `group` responses of at most `limit` tokens, then
    makes `minibatches` fp32 updates. kl_beta: weight of the KL to a reference model; at 0 neither
    system has a reference model."""

    limit: int
    questions: int = 16
    group: int = 16
    minibatches: int = 1
    kl_beta: float = 0.0
    temperature: float = 1.0
    clip: float = 0.2
    # So small that response lengths do not change while steps are measured.
    learning_rate: float = 1e-7

    @property
    def num_responses(self) -> int:
        return self.questions * self.group

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Write sums of two to four numbers as JSONL: prompts of unequal length."""
    draw = random.Random(seed)
    kind = "tools.bench.step.parity:grade"
    lines = []
    for _ in range(count):
        terms = [
            str(draw.randrange(1, 10 ** draw.randrange(1, 5))) for _ in range(draw.randrange(2, 5))
        ]
        lines.append({"question": f"{' + '.join(terms)} =", "truth": "0", "kind": kind})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def reward(response: str) -> float:
    """Return the parity of the length: free to compute, and different within a group."""
    return float(len(response) % 2)
