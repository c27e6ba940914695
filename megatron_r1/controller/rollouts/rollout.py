"""The parts of a rollout: P groups, one per prompt, of G graded responses each."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from r1_grading.terms import DEFAULT_WEIGHTS, are_equal

from megatron_r1.data.prompts import Prompt
from megatron_r1.engines.server.episodes import Episode
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.routing_shape import RoutingShape


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of a rollout.

    num_samples: G, responses per prompt.
    max_tokens: the longest response.
    step: the training step, from 1.
    weights: the weight of each term in the reward (`r1_grading.terms`).
    routing: shape of the experts' indices to return with each token, or None for none.
    with_teacher: whether the teacher scores every token.
    stop: strings that end a response with the token that completes one."""

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int
    step: int = 1
    weights: Mapping[str, float] = field(default_factory=lambda: DEFAULT_WEIGHTS)
    routing: RoutingShape | None = None
    with_teacher: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GradedResponse:
    """One response with its rewards (`r1_grading.terms.Reward`).

    text: the decoded response.
    rewards: each term alone.
    reward: their weighted sum, 0 and without meaning where `is_graded` is False.
    ungraded: terms whose grader failed.
    teacher_logprobs: float32, of each token at temperature 1; None where no teacher scored it.
    episode: None for a single turn; else `response` holds the sampled tokens of all its turns,
        `text` is its last answer."""

    response: Response
    text: str
    rewards: dict[str, float]
    reward: float
    reason: str
    ungraded: tuple[str, ...] = ()
    is_graded: bool = True
    teacher_logprobs: array[float] | None = None
    episode: Episode | None = None

    @property
    def truncated(self) -> bool:
        return self.response.finish_reason == "length"


@dataclass(frozen=True)
class Group:
    """All responses to one prompt."""

    prompt: Prompt
    prompt_ids: list[int]
    responses: list[GradedResponse]

    @property
    def has_equal_rewards(self) -> bool:
        """Whether all graded responses have the same reward but for rounding."""
        return are_equal([graded.reward for graded in self.responses if graded.is_graded])


@dataclass(frozen=True)
class Rollout:
    """The groups of one step or evaluation.

    rollout_seconds: until the last token was sampled. reward_seconds, teacher_seconds: from there
    to the last grade and to the teacher's last score. passed_over: groups that were sampled and
    graded but are not trained on (`collect_informative`)."""

    groups: list[Group]
    rollout_seconds: float
    reward_seconds: float
    passed_over: list[Group] = field(default_factory=list)
    teacher_seconds: float = 0.0


def responses_of(groups: list[Group]) -> list[GradedResponse]:
    """Return all responses of `groups`, in order."""
    return [graded for group in groups for graded in group.responses]
