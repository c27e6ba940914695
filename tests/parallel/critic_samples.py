"""The rollout that a critic learns from, in the trainer and in the naive loop; pure Python."""

import random

RATE, CLIP, STEPS, NORM = 0.5, 0.05, 3, 1.0
"""Learning rate, value clip, updates on one mini-batch, gradient norm that is clipped to."""
EPSILON, BETAS = 1.0, (0.9, 0.95)
"""Of Adam: a large epsilon makes its step smooth in the gradient."""


def rollout() -> list[tuple[list[int], list[int], float]]:
    """(prompt, response, return of every response token) of each sample; one of a single token."""
    draw = random.Random(5)
    made = []
    for length in (1, 7, 30, 12, 19, 3, 25, 16):
        prompt = [draw.randrange(67) for _ in range(draw.randrange(1, 6))]
        response = [draw.randrange(67) for _ in range(length)]
        made.append((prompt, response, draw.uniform(-2, 2)))
    return made
