"""A sampled response as text, its sampling parameters, the protocol of what responds, and the
grader of `eval` and `sample`: rewards of a single response, summed by constant weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from r1_grading import RewardPool, RewardTerms
from r1_grading.reading import THINK, Part, chain_of_thought, response_part
from r1_grading.rewards import UNGRADED
from r1_grading.terms import ACCURACY, Options, combine

from megatron_r1.config import AgentsConfig, RolloutConfig
from megatron_r1.data.chats import Message
from megatron_r1.data.prompt import Prompt


@dataclass(frozen=True)
class TextResponse:
    """A response and its grade.

    Attributes:
        text: the response without the `<think>` that its prompt may end with.
        num_tokens: the length in tokens; None if a server does not report it.
        is_truncated: whether the response was cut at the limit of tokens.
        thought_opened: whether the prompt ended with `<think>`.
        refusal: why the model gave no response, else "".
        index: the response's index among the question's samples.
        rewards: term → reward in [0, 1]; empty while the response is ungraded.
        reward: the weighted sum of the rewards.
        reason: the graders' reasons.
        is_ungraded: whether a grader was called and failed.
        episode: for a response of several turns, its fields in samples.jsonl (`Episode.record`)."""

    text: str
    num_tokens: int | None = None
    is_truncated: bool = False
    thought_opened: bool = False
    refusal: str = ""
    index: int = 0
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float | None = None
    reason: str = ""
    is_ungraded: bool = False
    episode: Mapping[str, Any] | None = None

    @property
    def length(self) -> int:
        """The length in tokens, or in characters where the tokens were not counted."""
        return len(self.text) if self.num_tokens is None else self.num_tokens

    @property
    def full_text(self) -> str:
        """The text with the `<think>` that its prompt may have opened."""
        return THINK + self.text if self.thought_opened else self.text

    @property
    def thought(self) -> str | None:
        """The text between the think tags; None where the response has none."""
        return chain_of_thought(self.text, self.thought_opened)

    def part(self, part: Part) -> str | None:
        """Return the summary (what follows the thought) or the whole response; None if empty."""
        return response_part(self.text, part, self.thought_opened).text

    def to_line(self) -> dict[str, Any]:
        """Return the fields of a line of samples.jsonl, an episode's last."""
        return {
            "response": self.text,
            "length": self.num_tokens,
            "truncated": self.is_truncated,
            "thought_opened": self.thought_opened,
            "refusal": self.refusal,
            "index": self.index,
            "rewards": self.rewards,
            "reward": self.reward,
            "reason": self.reason,
            "ungraded": self.is_ungraded,
            **(self.episode or {}),
        }

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Self:
        """Return the response of a line of the response log, as `to_line` wrote it."""
        copied_keys = ("refusal", "index", "rewards", "reward", "reason")
        return cls(
            text=line["response"],
            num_tokens=line["length"],
            is_truncated=line["truncated"],
            thought_opened=is_thought_opened(line),
            is_ungraded=is_ungraded(line),
            episode={k: line[k] for k in ("status", "turns")} if "turns" in line else None,
            **{name: line[name] for name in copied_keys},
        )


def is_thought_opened(line: Mapping[str, Any]) -> bool:
    """Whether the prompt of a line of samples.jsonl ended with `<think>`; older lines have
    `opened`."""
    return line["thought_opened"] if "thought_opened" in line else line["opened"]


def is_ungraded(line: Mapping[str, Any]) -> bool:
    """Whether the grader of a line of samples.jsonl failed; older lines say so in the reason."""
    return line.get("ungraded", line["reason"].startswith(UNGRADED))


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


class EvaluatedModel(Protocol):
    """A model that answers questions.

    Attributes:
        concurrency: the number of requests that keep it busy.
        identity: JSON values that must be the same when a run is resumed."""

    concurrency: int
    identity: dict[str, Any]

    async def start(self) -> None:
        """Make the model ready, before the first question.

        Raises:
            RunError: the model cannot be made ready.
        """

    async def respond(
        self, question: str, seed: int, before: Sequence[Message] = ()
    ) -> TextResponse:
        """Sample one response.

        Args:
            question: the user's last message.
            seed: the same gives the same response, as far as the engine can reproduce it.
            before: the messages before the question.
        """

    async def check(self, agents: AgentsConfig, prompts: Sequence[Prompt]) -> None:
        """Raise UserError where episodes of these prompts cannot be played."""

    async def play(self, agents: AgentsConfig, prompt: Prompt, seed: int) -> TextResponse:
        """Play one episode in the environment of `agents`, which may grade the episode.

        Args:
            agents: the environment and its limits.
            prompt: the prompt that the episode begins with.
            seed: the seed of the first turn.

        Raises:
            RunError: episodes fail again and again by no fault of the model."""

    async def close(self) -> None:
        """Release everything. May be called twice, and without `start`."""


class TextResponseGrader:
    """Grades a `TextResponse` by constant weights.

    Args:
        pool: the workers that grade.
        weights: reward term → weight in the sum.
        options: the options of each kind of reward.
    """

    def __init__(self, pool: RewardPool, weights: Mapping[str, float], options: Options) -> None:
        self._rewards, self._weights = RewardTerms(pool, options), weights
        self._terms = list(dict.fromkeys((ACCURACY, *weights)))

    async def grade(self, prompt: Prompt, response: TextResponse) -> TextResponse:
        """Return the response with its rewards; with the reason alone if a grader failed on it.

        Raises:
            ValueError: a reward that cannot be used.
            RunError: the service of a reward is down.
        """
        grades = await self._rewards.grade(
            self._terms, prompt, response.text, response.num_tokens, response.thought_opened
        )
        reward = combine(grades, self._weights)
        if failed := [t for t in reward.ungraded if t == ACCURACY or self._weights.get(t)]:
            reason = grades[failed[0]].reason
            return replace(response, rewards={}, reward=None, reason=reason, is_ungraded=True)
        return replace(response, rewards=reward.terms, reward=reward.total, reason=reward.reason)

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a reward that cannot be used."""
        await self._rewards.check(self._terms, prompts)
