"""How long responses will be: learned from those that came back.

What is learned is kept for each kind of question and size of prompt, because a proof takes more
tokens than a greeting. Of a group of n two numbers matter: the mean length, which is the work it
makes, and the longest, which says when it is back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY_GROUPS = 64
"""About so many groups are remembered: lengths drift while a policy learns, by far less than a
factor of two within one step of the paper's 512 groups."""
ENOUGH_GROUPS = 4
"""Before that many of its own, a kind is expected to be as all kinds together."""


@dataclass
class Expected:
    """Tokens of a response. mean: of all in a group. longest: of the longest in it."""

    mean: float
    longest: float
    num_groups: int = 0

    def learn(self, mean: float, longest: float) -> None:
        """Averages at first, then forgets what is old."""
        self.num_groups += 1
        share = 1 / min(self.num_groups, MEMORY_GROUPS)
        self.mean += share * (mean - self.mean)
        self.longest += share * (longest - self.longest)


class Lengths:
    """Learns from every group, by `learn`; says what to expect of the next, by `expect`."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int] | None, Expected] = {}

    def expect(self, kind: str, prompt_tokens: int, max_tokens: int) -> Expected:
        """Before anything is known: half of max_tokens, and one that takes all of them."""
        for key in (_key(kind, prompt_tokens), None):
            known = self._known.get(key)
            if known is not None and (key is None or known.num_groups >= ENOUGH_GROUPS):
                longest = min(known.longest, max_tokens)
                return Expected(min(known.mean, longest), longest, known.num_groups)
        return Expected(max_tokens / 2, max_tokens)

    def learn(self, kind: str, prompt_tokens: int, lengths: Sequence[int]) -> None:
        """lengths: of the responses of one group."""
        for key in (_key(kind, prompt_tokens), None):
            known = self._known.setdefault(key, Expected(0.0, 0.0))
            known.learn(sum(lengths) / len(lengths), max(lengths))


def _key(kind: str, prompt_tokens: int) -> tuple[str, int]:
    """Prompts up to 1, 3, 7, 15, ... tokens are of one size."""
    return kind, prompt_tokens.bit_length()
