"""Episodes as trees of turns, for the trainer and for the naive loop; pure Python."""

import random
from dataclasses import dataclass

RATE, NORM, EPSILON, BETAS, TEMPERATURE = 0.1, 1.0, 1.0, (0.9, 0.95), 0.8
"""Learning rate, gradient norm that is clipped to; of Adam, whose large epsilon makes its step
smooth in the gradient; what the logits are divided by."""

CLIP_LOW, CLIP_HIGH, KL_BETA, LIMIT = 0.02, 0.03, 0.1, 40
"""The clips are small, so that some ratios of a second update are outside of them."""

UPDATES = (
    ("sequence", "token"),
    ("sequence", "sequence"),
    ("token", "token"),
    ("constant", "token"),
)
"""(loss average, level of the ratio) of each update. Two rollouts are trained on, each in two
updates, the second of them off-policy."""


@dataclass
class Turn:
    """Tokens after turn `parent` (None: the root). sampled: by the policy."""

    parent: int | None
    tokens: list[int]
    sampled: bool


def episodes(seed: int) -> list[tuple[list[Turn], float]]:
    """Six episodes, each with its advantage.

    They have prompts, then answers to the newest turn, mostly with a tool's result between two;
    some answers follow an earlier turn and so begin a branch."""
    draw = random.Random(seed)

    def tokens(most):
        return [draw.randrange(67) for _ in range(draw.randint(1, most))]

    made = []
    for number in range(6):
        turns = [Turn(None, tokens(6), False)]
        for _ in range(1 + number):
            at = draw.randrange(len(turns)) if draw.random() < 0.4 else len(turns) - 1
            if turns[at].sampled or draw.random() < 0.5:
                turns.append(Turn(at, tokens(5), False))
                at = len(turns) - 1
            turns.append(Turn(at, tokens(8), True))
        made.append((turns, draw.uniform(-2, 2)))
    return made


def path(turns: list[Turn], number: int) -> list[int]:
    """Numbers of the turns from the root to turn `number`."""
    at: int | None = number
    found = []
    while at is not None:
        found.insert(0, at)
        at = turns[at].parent
    return found
