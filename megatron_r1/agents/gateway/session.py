"""A session of the gateway: one episode's secret, token tree, limits and failures."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_r1.agents.conversation_matching import NextPrompt
from megatron_r1.agents.gateway.request import Message, RequestError, TurnReply, TurnRequest
from megatron_r1.agents.token_tree import TokenTree
from megatron_r1.engines.episodes import Generate
from megatron_r1.engines.server.errors import EngineError


@dataclass(frozen=True)
class SessionLimits:
    """Limits of one episode.

    Attributes:
        max_turns: sampled turns.
        max_tokens: sampled tokens of all turns.
        max_parallel: turns that are sampled at once."""

    max_turns: int
    max_tokens: int
    max_parallel: int = 64


@dataclass(frozen=True)
class TurnSampling:
    """The run's sampling of a session's turns.

    Attributes:
        generate: samples an answer to a prompt.
        max_model_len: most tokens of a prompt and its answer.
        temperature: the sampling temperature.
        top_p: the sampling's probability mass."""

    generate: Generate
    max_model_len: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class SampledTurn:
    """A sampled turn and its request.

    Attributes:
        prompt: what its tokens follow in the tree.
        request: what the client asked for.
        reply: what the client gets.
        is_added: whether it is in the session's tree."""

    prompt: NextPrompt
    request: TurnRequest
    reply: TurnReply
    is_added: bool = False


@dataclass
class GatewaySession:
    """One episode behind the gateway.

    Attributes:
        limits: the most turns and tokens of the episode.
        sampling: how its turns are sampled.
        secret: the key that the client sends.
        tree: the tokens of the turns that were delivered.
        status: how the episode has ended, by a limit or a failure that the policy did not cause;
            None until then.
        reason: why the episode has ended.
        notes: how often each sampling option was replaced, and each request refused.
        num_turns: turns in the tree.
        num_tokens: sampled tokens in the tree.
        num_claimed: tokens that engines have sampled, including those of turns that are not in the
            tree yet.
        stored: conversations by the id of their last reply, for `previous_response_id`.
        undelivered: turns whose client has closed its connection, by a hash of their request. If
            the client repeats the request, it gets the same turn, and no second one is sampled.
        failures: failures of the engines to sample a turn, by a hash of its request. A repetition
            that succeeds removes its failure.
        running: the tasks that sample a turn now.
        last_text: the text of the newest answer."""

    limits: SessionLimits
    sampling: TurnSampling
    secret: str = field(default_factory=lambda: f"r1-{secrets.token_urlsafe(32)}", repr=False)
    tree: TokenTree = field(default_factory=TokenTree)
    status: str | None = None
    reason: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    num_turns: int = 0
    num_tokens: int = 0
    num_claimed: int = 0
    stored: dict[str, list[Message]] = field(default_factory=dict)
    undelivered: dict[bytes, asyncio.Task[SampledTurn]] = field(default_factory=dict)
    failures: dict[bytes, str] = field(default_factory=dict)
    running: set[asyncio.Task[SampledTurn]] = field(default_factory=set)
    last_text: str = ""
    _engine_seconds: float = 0.0
    _num_waiting: int = 0
    _waiting_since: float = 0.0

    @property
    def engine_seconds(self) -> float:
        """Return the wall time in which at least one turn waited for engines and parsers."""
        current_wait = time.monotonic() - self._waiting_since if self._num_waiting else 0.0
        return self._engine_seconds + current_wait

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as the engines'."""
        if not self._num_waiting:
            self._waiting_since = time.monotonic()
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._engine_seconds += time.monotonic() - self._waiting_since

    @property
    def is_out_of_tokens(self) -> bool:
        """Whether the episode's tokens are all used up."""
        return self.num_tokens >= self.limits.max_tokens

    def end(self, status: str, reason: str) -> None:
        """Set the status, unless the episode has ended already. After a failed turn the status is
        engine_error, whatever is given."""
        if self.status is None:
            failure = next(iter(self.failures.values()), None)
            self.status, self.reason = (
                (status, reason) if failure is None else ("engine_error", failure)
            )

    def max_tokens(self, client_limit: int | None, num_prompt_tokens: int) -> int:
        """Return the most tokens that a turn may sample.

        Raises:
            RequestError: a limit is reached.
        """
        if self.num_turns >= self.limits.max_turns:
            reason = f"the episode has had its {self.limits.max_turns} turns"
            self.end("max_turns", reason)
            raise RequestError(reason, code="max_turns")
        # Turns in flight may yet fail, so they do not end the episode.
        limit = min(self.limits.max_parallel, self.limits.max_turns - self.num_turns)
        if len(self.running) >= limit:
            raise RequestError(
                f"{len(self.running)} turns of this session are being sampled; it may have {limit}",
                status=429,
                kind="rate_limit_error",
            )
        num_tokens = self.limits.max_tokens - self.num_claimed
        context_room = self.sampling.max_model_len - num_prompt_tokens
        if min(num_tokens, context_room) < 1:
            raise self.end_out_of_tokens(
                f"the episode has had its {self.limits.max_tokens} sampled tokens"
                if num_tokens < 1
                else f"{num_prompt_tokens} prompt tokens leave no room for an answer: the engines "
                f"take {self.sampling.max_model_len}"
            )
        return min(num_tokens, context_room, client_limit or num_tokens)

    def claim(self, num_tokens: int) -> int:
        """Count a sampled turn's tokens against the episode's limit; return how many of them fit.

        Turns in flight share the tokens that are left. If a turn reserved its tokens when it
        started, one without a maximum would block all others; so the last to finish is cut.

        Raises:
            RequestError: no tokens were left.
        """
        num_kept = min(num_tokens, self.limits.max_tokens - self.num_claimed)
        if num_tokens and num_kept < 1:
            raise self.end_out_of_tokens(
                f"other turns at once have used up the {self.limits.max_tokens} sampled tokens of "
                "the episode"
            )
        self.num_claimed += num_kept
        return num_kept

    def end_out_of_tokens(self, reason: str) -> RequestError:
        """End the episode as max_tokens; return the refusal."""
        self.end("max_tokens", reason)
        return RequestError(reason, code="context_length_exceeded")

    def add(self, sampled: SampledTurn) -> TurnReply:
        """Add a turn to the tree, once, and return its reply. Call it when the reply is sent: a
        turn that reached no client is not trained."""
        if sampled.is_added:
            return sampled.reply
        sampled.is_added = True
        prompt, request, reply = sampled.prompt, sampled.request, sampled.reply
        parent = prompt.parent
        if prompt.token_ids or parent is None:
            tools = request.tools if parent is None else ()
            parent = self.tree.add_prompt(parent, prompt.token_ids, prompt.messages, tools)
        self.tree.add_sampled(parent, reply.response, reply.message)
        self.num_turns += 1
        self.num_tokens += reply.num_tokens
        self.last_text = reply.message["content"]
        if request.stored:
            self.stored[f"resp_{reply.id}"] = [*request.stored, reply.message]
        return reply

    def on_turn_done(self, key: bytes, task: asyncio.Task[SampledTurn]) -> None:
        """Count a turn's task off.

        Args:
            key: the hash of the turn's request.
            task: the turn's task."""
        self.running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.failures.pop(key, None)
        elif isinstance(error.__cause__, EngineError):
            self.failures[key] = str(error.__cause__)

    async def close(self) -> None:
        """Cancel what is still being sampled; the engines abort it."""
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
