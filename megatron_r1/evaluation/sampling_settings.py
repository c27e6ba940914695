"""The sampling parameters of an evaluation or a sampling, as vLLM takes them."""

from dataclasses import dataclass, replace
from typing import Self

from megatron_r1.config import RolloutConfig


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling parameters.

    Attributes:
        temperature: 0 is greedy.
        top_p: the share of the distribution that is drawn from.
        max_tokens: the most tokens of a response.
        stop: strings that end a response, besides the model's end tokens.
        stop_token_ids: tokens that end a response, besides the model's end tokens.
        top_k: the most tokens of a draw, or None.
        min_p: the least probability of a token, as a share of the likeliest one's."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_k: int | None = None
    min_p: float = 0.0

    @classmethod
    def from_rollout(cls, rollout: RolloutConfig) -> Self:
        """Return those of a recipe's `rollout`, as it samples for training."""
        limits = rollout.temperature, rollout.top_p, rollout.max_response_tokens
        return replace(cls.from_options(rollout, *limits), top_k=rollout.top_k, min_p=rollout.min_p)

    @classmethod
    def from_options(
        cls, rollout: RolloutConfig, temperature: float, top_p: float, max_tokens: int
    ) -> Self:
        """Return those of a recipe's `rollout` with this temperature, cut and limit.

        Args:
            rollout: the recipe's section.
            temperature: 0: greedy.
            top_p: the cut of the distribution.
            max_tokens: the most of a response.
        """
        ends = tuple(rollout.stop), tuple(rollout.stop_token_ids)
        return cls(temperature, top_p, max_tokens, *ends)
