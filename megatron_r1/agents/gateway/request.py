"""A request as every protocol has it: the turn that it asks for, the reply, the refusal."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megatron_r1.engines.server.responses import Response

SERVED_MODEL = "policy"
"""The model's name in /v1/models; a request may have any other."""
Message = dict[str, Any]
"""A chat message in OpenAI's form; content is text, arguments of tool calls are JSON text."""


class RequestError(Exception):
    """A request that is not served.

    Args:
        message: what is wrong.
        field: the path of the field in the request, None for the whole request.
        status: the HTTP status of the reply.
        kind: the error's type, as OpenAI and Anthropic name it.
        code: the error's code, None for none."""

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
        self.field = field
        self.status = status
        self.kind = kind
        self.code = code


@dataclass
class TurnRequest:
    """A client's request for one turn.

    Attributes:
        messages: the conversation, in OpenAI's form, also where the client uses another API.
        tools: descriptions of the tools, in OpenAI's form.
        model: the name that the client gave; the reply repeats it.
        max_tokens: None for as many as fit.
        stop: strings that end the answer.
        stream: whether the reply is sent as server-sent events.
        include_usage: whether a stream ends with the counts of tokens.
        max_calls: 1 where the client takes one tool call a turn.
        options: the request's sampling options that differ from the neutral ones; the run's own
            replace them (`sampling_options`).
        token_ids: the whole prompt, in token mode.
        stored: the conversation that a later request may continue by `previous_response_id`.
    """

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
    """One sampled turn.

    Attributes:
        model: the name that the client gave.
        num_prompt_tokens: tokens of the prompt, all earlier turns included.
        response: the sampled tokens.
        message: the assistant's message.
        stop_string: which of `TurnRequest.stop` ended it.
        id: unique, hexadecimal.
        created: seconds since 1970.
    """

    model: str
    num_prompt_tokens: int
    response: Response
    message: Message
    stop_string: str | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the turn, its reasoning included."""
        return len(self.response.token_ids)

    @property
    def is_truncated(self) -> bool:
        """Whether the answer ended at the limit of tokens."""
        return self.response.finish_reason == "length"

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of the answer, as in OpenAI's chat format."""
        return self.message.get("tool_calls", [])

    @property
    def reasoning(self) -> str | None:
        """The thought before the answer; None where the parser found none."""
        return self.message.get("reasoning_content")


def server_sent_event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event with the name of its type."""
    return b"event: " + value["type"].encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
