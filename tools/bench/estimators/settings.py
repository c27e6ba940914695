"""What each algorithm is given beside the demo's recipe: the one table of this bench's choices.

A setting that is not here is the demo's (examples/laptop/r1_zero.yaml) or, where that says nothing,
the algorithm's own default (docs/algorithms.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TEACHER = "grpo"
"""Whose model teaches on-policy distillation."""


@dataclass(frozen=True)
class Choice:
    """settings: sections of a recipe. why: what makes no sense at this size without them."""

    settings: dict[str, Any] = field(default_factory=dict)
    why: str = ""


CHOICES: dict[str, Choice] = {
    "grpo": Choice(),
    "dapo": Choice(),
    "dr_grpo": Choice(),
    "gspo": Choice(
        {"rl": {"clip_low": 0.015, "clip_high": 0.02}},
        "clips 50 times its source's: at this learning rate an update moves an output's ratio that "
        "much further, and its own clips would silence all mini-batches after the first",
    ),
    "cispo": Choice(),
    "reinforce": Choice(
        {"rl": {"minibatches": 4}},
        "as many updates as the others: Adam's steps have their length whatever the batch, and one "
        "a rollout would go a quarter of the way",
    ),
    "reinforce_pp": Choice(),
    "rloo": Choice(
        {"rl": {"minibatches": 4, "group_size": 16}},
        "as many answers and updates as the others, for the same reason",
    ),
    "ppo": Choice(
        {"critic": {"learning_rate": 3.0e-4, "warmup_steps": 2}},
        "the critic's head begins with zeros and has few steps: it learns faster than the policy, "
        "and two steps before it, which count",
    ),
    "on_policy_distillation": Choice(
        {"teacher": {"path": f"${{{TEACHER}.hf}}", "dtype": "float32"}},
        f"the teacher is {TEACHER}'s model of the same run and seed",
    ),
}
