"""A finished episode: its status, its turns as text, and the branches that are trained."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from megatron_r1.agents.tree import Branch, Message, TokenTree
from megatron_r1.engine.responses import Response

Scored = Literal["done", "max_turns", "max_tokens", "agent_timeout"]
"""The ends of an episode that the policy has caused: its reward counts."""
Ungraded = Literal["engine_error", "environment_error", "harness_error", "protocol_error"]
"""The ends that the policy has not caused: such an episode has no reward, and no part in a group's
mean."""
Status = Literal[Scored, Ungraded]
SCORED: tuple[str, ...] = get_args(Scored)
STATUSES: tuple[str, ...] = get_args(Scored) + get_args(Ungraded)


@dataclass(frozen=True)
class Turn:
    """One message of an episode.

    num_tokens: the message's tokens, including the tokens that the template adds. Of messages that
        were given together, the last has all their tokens, the others 0.
    trained: whether the policy sampled the message.
    policy_version: the version that sampled its last token; None for a given message."""

    role: str
    text: str
    num_tokens: int
    trained: bool
    policy_version: int | None = None


@dataclass(frozen=True)
class Episode:
    """A played episode. branches: its token sequences (`TokenTree.branches`). reason: what ended
    the episode, if the policy did not. tool_seconds: the time spent in the environment's methods.
    engine_seconds: the time spent waiting for engines."""

    status: Status
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
        return self.status in SCORED

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
            sampled = np.frombuffer(branch.is_sampled, bool)
            token_ids.frombytes(np.asarray(branch.token_ids)[sampled].tobytes())
            logprobs.frombytes(np.asarray(branch.logprobs)[sampled].tobytes())
            versions.frombytes(np.asarray(branch.policy_versions)[sampled].tobytes())
        reason = "length" if self.status == "max_tokens" else "stop"
        return Response(token_ids, logprobs, versions, reason)


def turns_of(tree: TokenTree, decode: Callable[[Sequence[int]], str]) -> list[Turn]:
    """Return the turns of an episode in the order in which they happened. decode: returns the text
    of tokens."""
    turns = []
    for node in tree.nodes:
        count, last = len(node.token_ids), len(node.messages) - 1
        if node.policy_versions is not None:
            version = node.policy_versions[-1] if node.policy_versions else None
            text = decode(node.token_ids)
            turns.append(Turn("assistant", text, count, trained=True, policy_version=version))
            continue
        turns += [
            Turn(message["role"], _text(message), count if at == last else 0, trained=False)
            for at, message in enumerate(node.messages)
        ]
    return turns


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if calls := message.get("tool_calls"):
        return f"{content}{json.dumps(calls)}"
    text = content if isinstance(content, str) else json.dumps(content)
    return text.encode("utf-8", "replace").decode()  # a tool may return half a surrogate pair
