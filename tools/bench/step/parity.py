"""The bench's reward for megatron-r1: `"kind": "tools.bench.step.parity:grade"`."""

from megatron_r1.rewards import Grade
from tools.bench.step.work import reward


def grade(response: str, truth: str, **entry) -> Grade:
    return Grade(reward(response), "parity of its length")
