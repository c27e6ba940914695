"""Estimates of a response's length, by those of earlier rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

AVERAGED_GROUPS = 64
"""Groups over which the moving averages extend: lengths drift while a policy learns, by far less
than a factor of two within one step of the paper's 512 groups."""
ENOUGH_GROUPS = 4
"""The groups of one kind of prompt that are needed to estimate that kind apart from the others."""


@dataclass
class ExpectedLength:
    """The expected number of tokens of a response.

    Attributes:
        mean: the mean over a group.
        longest: the longest response of a group.
        num_groups: the number of groups that the estimate is made from."""

    mean: float
    longest: float
    num_groups: int = 0

    def update(self, mean: float, longest: float) -> None:
        """Add a group: a plain average at first, later an exponential moving one."""
        self.num_groups += 1
        weight = 1 / min(self.num_groups, AVERAGED_GROUPS)
        self.mean += weight * (mean - self.mean)
        self.longest += weight * (longest - self.longest)


class LengthEstimator:
    """Estimates response lengths from completed groups."""

    def __init__(self) -> None:
        self._averages: dict[tuple[str, int] | None, ExpectedLength] = {}

    def estimate(self, kind: str, num_prompt_tokens: int, max_tokens: int) -> ExpectedLength:
        """Return the expected length of a group's responses; before any group is known, a mean of
        half of max_tokens and a longest of max_tokens.

        Args:
            kind: the prompt's kind.
            num_prompt_tokens: tokens of the prompt.
            max_tokens: the longest response that may be sampled."""
        for key in (_length_key(kind, num_prompt_tokens), None):
            average = self._averages.get(key)
            if average is not None and (key is None or average.num_groups >= ENOUGH_GROUPS):
                max_length = min(average.longest, max_tokens)
                return ExpectedLength(min(average.mean, max_length), max_length, average.num_groups)
        return ExpectedLength(max_tokens / 2, max_tokens)

    def add(self, kind: str, num_prompt_tokens: int, lengths: Sequence[int]) -> None:
        """Add the response lengths (tokens) of one complete group.

        Args:
            kind: the prompt's kind.
            num_prompt_tokens: tokens of the prompt.
            lengths: tokens of each response."""
        for key in (_length_key(kind, num_prompt_tokens), None):
            average = self._averages.setdefault(key, ExpectedLength(0.0, 0.0))
            average.update(sum(lengths) / len(lengths), max(lengths))


def _length_key(kind: str, num_prompt_tokens: int) -> tuple[str, int]:
    """Return the bucket of a prompt: its kind and the power of two of its length."""
    return kind, num_prompt_tokens.bit_length()
