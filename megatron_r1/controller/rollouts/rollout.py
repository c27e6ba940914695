"""A rollout: P groups, one per prompt, of G graded responses each."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from r1_grading.terms import DEFAULT_WEIGHTS, rewards_equal

from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.episodes import Episode
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.routing_shape import RoutingShape


@dataclass(frozen=True)
class RolloutSampling:
    """Settings of the sampling of a rollout.

    Attributes:
        group_size: G, responses per prompt.
        temperature: divides the logits; 1 samples the policy's own distribution.
        top_p: the share of probability of the likeliest tokens that a draw keeps, in (0, 1].
        max_response_tokens: the longest response.
        step: the training step, from 1.
        reward_weights: the weight of each term in the reward (`r1_grading.terms`).
        routing: shape of the experts' indices to return with each token, or None for none.
        with_teacher: whether the teacher computes log-probabilities of every token.
        stop: strings that end a response with the token that completes one.
        top_k: the most tokens of a draw, or None.
        min_p: the least probability of a token, as a share of the likeliest one's.
        sampling_mask: whether the engine returns the tokens that these and top_p kept.
    """

    group_size: int
    temperature: float
    top_p: float
    max_response_tokens: int
    step: int = 1
    reward_weights: Mapping[str, float] = field(default_factory=lambda: DEFAULT_WEIGHTS)
    routing: RoutingShape | None = None
    with_teacher: bool = False
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float = 0.0
    sampling_mask: bool = False


@dataclass(frozen=True)
class GradedResponse:
    """One response with its rewards (`r1_grading.terms.Reward`).

    Attributes:
        response: the sampled tokens, their log-probabilities and policy versions.
        text: the decoded response.
        rewards: each term alone.
        reward: their weighted sum, 0 and without meaning where `is_graded` is False.
        reason: the grader's explanation, or why there is no grade.
        ungraded_terms: terms whose grader failed.
        is_graded: False where a grader failed: the response is not trained on.
        teacher_logprobs: float32, of each token at temperature 1; None where no teacher
            computed them.
        episode: None for a single turn; else `response` holds the sampled tokens of all its turns,
            `text` is its last answer.
    """

    response: Response
    text: str
    rewards: dict[str, float]
    reward: float
    reason: str
    ungraded_terms: tuple[str, ...] = ()
    is_graded: bool = True
    teacher_logprobs: array[float] | None = None
    episode: Episode | None = None

    @property
    def is_truncated(self) -> bool:
        """Whether the response ended at the limit of tokens."""
        return self.response.finish_reason == "length"


@dataclass(frozen=True)
class Group:
    """All responses to one prompt.

    Attributes:
        prompt: the row of the data.
        prompt_ids: its question in the template, as tokens.
        responses: one per sample, graded."""

    prompt: Prompt
    prompt_ids: list[int]
    responses: list[GradedResponse]

    @property
    def has_equal_rewards(self) -> bool:
        """Whether all graded responses have the same reward but for rounding."""
        return rewards_equal([graded.reward for graded in self.responses if graded.is_graded])


@dataclass(frozen=True)
class Rollout:
    """The groups of one step or evaluation.

    Attributes:
        groups: those that are trained on or evaluated, in the order of their prompts.
        rollout_seconds: until the last token was sampled.
        reward_seconds: from there to the last grade.
        filtered_groups: groups that were sampled and graded but are not trained on
            (`collect_dynamic_rollout`).
        teacher_seconds: from the last sampled token to the teacher's last log-probability.
    """

    groups: list[Group]
    rollout_seconds: float
    reward_seconds: float
    filtered_groups: list[Group] = field(default_factory=list)
    teacher_seconds: float = 0.0


def all_responses(groups: list[Group]) -> list[GradedResponse]:
    """Return all responses of `groups`, in order."""
    return [graded for group in groups for graded in group.responses]
