"""One turn as every protocol has it: the request, the reply, and the refusal of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""A chat message in OpenAI's form; content is text, arguments of tool calls are JSON text."""


class Refused(Exception):
    """A request that is not served. kind: the error's type, as OpenAI and Anthropic name it."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.status, self.kind, self.code = field, status, kind, code


@dataclass
class TurnRequest:
    """A client's request for one turn.

    max_tokens: None for as many as fit.
    max_calls: 1 where the client takes one tool call a turn.
    options: the request's sampling options that differ from the neutral ones; the run's own replace
        them (`sampling_options`).
    token_ids: the whole prompt, in token mode.
    stored: the conversation that a later request may continue by `previous_response_id`."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    model: str
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    max_calls: int | None = None
    options: dict[str, object] = field(default_factory=dict)
    token_ids: list[int] | None = None
    stored: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class TurnReply:
    """One sampled turn. id: unique, hexadecimal. message: the assistant's. finish_reason: `stop` or
    `length`. stop_string: which of `TurnRequest.stop` ended it."""

    id: str
    model: str
    created: int
    message: Message
    finish_reason: str
    stop_string: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    token_ids: list[int]
    logprobs: list[float]
    policy_versions: list[int]

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return self.message.get("tool_calls", [])

    @property
    def reasoning(self) -> str | None:
        return self.message.get("reasoning_content")
