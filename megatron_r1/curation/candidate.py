"""One answer to a question, and what is known of it when it is decided upon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.rewards.answer import THINK
from megatron_r1.rewards.base import UNGRADED
from megatron_r1.rewards.language import chain_of_thought
from megatron_r1.rewards.remote.response_text import Part, response_part


@dataclass(frozen=True)
class Candidate:
    """text: the response. num_tokens: None where a server does not count. opened: the prompt ended
    with `<think>`. refusal: why there is no response. rewards: term → [0, 1], empty where nothing
    graded; reward: their weighted sum; reason: why, or that it cannot be graded."""

    index: int
    text: str
    num_tokens: int | None = None
    truncated: bool = False
    opened: bool = False
    refusal: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float | None = None
    reason: str = ""

    @property
    def is_ungraded(self) -> bool:
        """Whether a grader was asked and failed."""
        return self.reason.startswith(UNGRADED)

    @property
    def length(self) -> int:
        """In tokens; in characters where nobody counted."""
        return len(self.text) if self.num_tokens is None else self.num_tokens

    @property
    def whole(self) -> str:
        """The response with the `<think>` that its prompt may have opened."""
        return THINK + self.text if self.opened else self.text

    @property
    def thought(self) -> str | None:
        return chain_of_thought(self.text, self.opened)

    def part(self, part: Part) -> str | None:
        """summary: what follows the thought; None where there is nothing."""
        return response_part(self.text, part, self.opened).text


def from_line(line: Mapping[str, Any]) -> Candidate:
    """The candidate of a line of samples.jsonl."""
    return Candidate(
        index=line["index"],
        text=line["response"],
        num_tokens=line["length"],
        truncated=line["truncated"],
        opened=line["opened"],
        refusal=line["refusal"],
        rewards=line["rewards"],
        reward=line["reward"],
        reason=line["reason"],
    )


def to_line(candidate: Candidate) -> dict[str, Any]:
    return {
        "index": candidate.index,
        "response": candidate.text,
        "length": candidate.num_tokens,
        "truncated": candidate.truncated,
        "opened": candidate.opened,
        "refusal": candidate.refusal,
        "rewards": dict(candidate.rewards),
        "reward": candidate.reward,
        "reason": candidate.reason,
    }
