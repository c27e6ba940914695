"""Played episodes as the RL loop gets them, and the protocol of what plays them.

An episode is a conversation of several turns. `megatron_r1.agents` plays them; without a setting in
section `agents` none of its modules is imported."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.server.responses import Response

RewardedStatus = Literal["done", "max_turns", "max_tokens", "agent_timeout"]
"""The ends of an episode that the policy has caused: its reward counts."""
UngradedStatus = Literal["engine_error", "environment_error", "harness_error", "protocol_error"]
"""The ends that the policy has not caused: such an episode has no reward, and no part in a group's
mean."""
EpisodeStatus = Literal[RewardedStatus, UngradedStatus]
REWARDED_STATUSES: tuple[str, ...] = get_args(RewardedStatus)
STATUSES: tuple[str, ...] = get_args(RewardedStatus) + get_args(UngradedStatus)


@dataclass(frozen=True)
class Turn:
    """One message of an episode.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        text: the decoded message.
        num_tokens: the message's tokens, including the tokens that the template adds. Of messages
            that were given together, the last has all their tokens, the others 0.
        trained: whether the policy sampled the message.
        policy_version: the version that sampled its last token; None for a given message.
    """

    role: str
    text: str
    num_tokens: int
    trained: bool
    policy_version: int | None = None


@dataclass(frozen=True)
class Branch:
    """A token sequence from a root to an answer that no other sampled turn follows.

    Attributes:
        token_ids: the whole sequence.
        is_sampled: one byte a token, 1 where the token was sampled and is trained in this branch.
        logprobs: the engine's log-probabilities, float32; 0 where is_sampled is 0.
        policy_versions: the version that sampled each token; -1 where is_sampled is 0.
        routing: the routed experts of all tokens but the last, or empty.
        sampling_mask: the tokens that the sampler kept where is_sampled is 1, or empty
            (`models.sampling_mask`)."""

    token_ids: array[int]
    is_sampled: bytes
    logprobs: array[float]
    policy_versions: array[int]
    routing: bytes = b""
    sampling_mask: bytes = b""

    @property
    def num_sampled(self) -> int:
        """Number of tokens trained in this branch."""
        return self.is_sampled.count(1)


@dataclass(frozen=True)
class Episode:
    """A played episode.

    Attributes:
        status: how it ended; `STATUSES` lists all.
        turns: its messages in order, given and sampled ones.
        branches: its token sequences, from the first token to an answer that no other follows.
        num_tool_calls: tool calls that the policy made.
        num_tool_errors: those of them whose result was an error.
        tool_seconds: the time spent in the environment's methods.
        engine_seconds: the time spent waiting for engines.
        reason: what ended the episode, if the policy did not.
    """

    status: EpisodeStatus
    turns: list[Turn]
    branches: list[Branch]
    num_tool_calls: int = 0
    num_tool_errors: int = 0
    tool_seconds: float = 0.0
    engine_seconds: float = 0.0
    reason: str = ""

    @property
    def has_reward(self) -> bool:
        """Whether the policy caused the end, so that the episode's reward counts."""
        return self.status in REWARDED_STATUSES

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all branches; a token that branches share counts in each of them."""
        return sum(len(branch.token_ids) for branch in self.branches)

    def record(self) -> dict[str, Any]:
        """Return the fields that the episode adds to its line of samples.jsonl."""
        turns = [
            {
                "role": turn.role,
                "text": turn.text,
                "tokens": turn.num_tokens,
                "trained": turn.trained,
                "policy_version": turn.policy_version,
            }
            for turn in self.turns
        ]
        return {"status": self.status, "turns": turns}

    def response(self) -> Response:
        """Return the sampled tokens of all turns, end to end, as one response."""
        token_ids, logprobs, versions = array("i"), array("f"), array("i")
        for branch in self.branches:
            is_sampled = np.frombuffer(branch.is_sampled, bool)
            token_ids.frombytes(np.asarray(branch.token_ids)[is_sampled].tobytes())
            logprobs.frombytes(np.asarray(branch.logprobs)[is_sampled].tobytes())
            versions.frombytes(np.asarray(branch.policy_versions)[is_sampled].tobytes())
        reason = "length" if self.status == "max_tokens" else "stop"
        return Response(token_ids, logprobs, versions, reason)


@dataclass(frozen=True)
class EpisodeResult:
    """A played episode with what its reward is computed of.

    Attributes:
        episode: its turns and branches.
        text: the text of its last answer.
        reward: the environment's; None if the environment has no `get_reward`, or the
            episode's `has_reward` is False."""

    episode: Episode
    text: str
    reward: float | None


Generate = Callable[[Sequence[int], int], Awaitable[Response]]
"""(tokens of a prompt, most tokens of the response) → one sampled response."""


class Player(Protocol):
    """Plays a run's episodes: `agents.player.EpisodePlayer` or `agents.harness.HarnessPlayer`."""

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Start what the episodes need.

        Raises:
            UserError: the episodes cannot be played.
        """

    async def play(self, prompt: Prompt, generate: Generate, max_tokens: int) -> EpisodeResult:
        """Play one episode of a row.

        Args:
            prompt: the row.
            generate: samples the policy's turns.
            max_tokens: the most tokens after the first prompt.
        """
        ...

    async def close(self) -> None:
        """End what `check` and `play` have started."""
