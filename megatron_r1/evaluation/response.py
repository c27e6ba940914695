"""A sampled response as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from r1_grading.reading import THINK, Part, chain_of_thought, response_part
from r1_grading.rewards import UNGRADED


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
