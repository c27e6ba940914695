"""The bench's reward as megatron-r1 takes it: `"kind": "parity:grade"`."""

from work import reward

from megatron_r1.rewards import Grade


def grade(response: str, truth: str, **entry) -> Grade:
    return Grade(reward(response), "parity of its length")
