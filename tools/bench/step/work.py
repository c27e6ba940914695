"""The work of both systems: questions, limits, reward, and the part of the algorithm they share."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.base.files.jsonl import write_lines


@dataclass(frozen=True)
class StepWork:
    """One setting. A step samples `questions` x `group` responses of at most `limit` tokens, then
    makes `minibatches` fp32 updates. kl_beta: weight of the KL to a reference model; at 0 neither
    system has a reference model. peer_microbatch: responses in one of TRL's forward and backward
    passes; 0: all of an update."""

    limit: int
    questions: int = 16
    group: int = 16
    minibatches: int = 1
    kl_beta: float = 0.0
    temperature: float = 1.0
    clip: float = 0.2
    # So small that response lengths do not change while steps are measured.
    learning_rate: float = 1e-7
    peer_microbatch: int = 0

    @property
    def num_responses(self) -> int:
        return self.questions * self.group


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Write sums of two to four numbers as JSONL: prompts of unequal length."""
    draw, rows = random.Random(seed), []
    kind = "tools.bench.step.work:grade"
    for _ in range(count):
        numbers = range(draw.randrange(2, 5))
        terms = [str(draw.randrange(1, 10 ** draw.randrange(1, 5))) for _ in numbers]
        rows.append({"question": f"{' + '.join(terms)} =", "truth": "0", "kind": kind})
    return write_lines(path, rows)


def reward(response: str) -> float:
    """Return the parity of the length: free to compute, and different within a group."""
    return float(len(response) % 2)


def grade(response: str, truth: str, **entry) -> Any:
    """Return `reward` as megatron-r1 takes it, for the questions' "kind"."""
    from r1_grading import Grade  # here, as TRL's interpreter need not have it

    return Grade(reward(response), "parity of its length")
