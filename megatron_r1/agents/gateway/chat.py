"""OpenAI's Chat Completions: POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from megatron_r1.agents.gateway.body import NO_DEFAULT, SAMPLING, Body, content_text, stop_strings
from megatron_r1.agents.gateway.request import Message, RequestError, TurnReply, TurnRequest
from megatron_r1.agents.parsed_turn import PARSE_ERROR, tool_call

NEUTRAL_VALUES = SAMPLING | {"reasoning_effort": None, "verbosity": None}
IGNORED_FIELDS = (
    "metadata",
    "moderation",
    "prompt_cache_key",
    "prompt_cache_options",
    "store",
    "user",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
)
END_EVENT = b"data: [DONE]\n\n"
"""The end of a stream: OpenAI's client reads until this event, not until the connection closes."""
KEEP_ALIVE = b": sampling\n\n"
"""A comment of server-sent events, which clients skip."""


def parse_request(body: Body, stored: object) -> TurnRequest:
    """Return the turn that a body requests.

    Args:
        body: the request's body.
        stored: not used here.

    Raises:
        RequestError: for a body that cannot be served."""
    body.ignore(*IGNORED_FIELDS)
    model = body.take("model", str, "")
    messages = [_read_message(message) for message in body.take_objects("messages")]
    require_turn(messages, "messages")
    tools = [_read_tool(tool) for tool in body.take_objects("tools", [])]
    options = body.options(NEUTRAL_VALUES)
    choice = body.take("tool_choice", (str, dict), "auto")
    if choice == "none":
        # Left out of the prompt: to forbid the calls while sampling would change the distribution.
        tools = []
    elif choice != "auto":
        options["tool_choice"] = choice
    body.take_fixed(n=1, logprobs=False, top_logprobs=0, logit_bias={}, modalities=["text"])
    body.take_fixed(response_format={"type": "text"})
    calls_in_parallel = body.take("parallel_tool_calls", bool, True)
    # `max_tokens` is the deprecated name of the same limit.
    limit = body.take_positive("max_completion_tokens")
    request = TurnRequest(
        messages,
        tools,
        model,
        max_tokens=body.take_positive("max_tokens") if limit is None else limit,
        stop=stop_strings(body.take("stop", (str, list), []), "stop"),
        stream=body.take("stream", bool, False),
        include_usage=bool(body.take("stream_options", dict, {}).get("include_usage")),
        max_calls=None if calls_in_parallel else 1,
        options=options,
    )
    body.ignore("max_tokens")  # sent besides the newer name, which counts
    body.finish()
    return request


def require_turn(messages: list[Message], path: str) -> None:
    """Raise RequestError for messages after which it is not the assistant's turn: one is sampled
    whole."""
    if not messages:
        raise RequestError("must not be empty", path)
    if messages[-1]["role"] == "assistant":
        raise RequestError("the last message is the assistant's; a turn cannot be continued", path)


def format_reply(turn: TurnReply, request: TurnRequest) -> dict[str, Any]:
    """Return a turn as the body of OpenAI's chat completion."""
    # OpenAI's content is null where the assistant wrote nothing besides its calls.
    content = turn.message["content"] or (None if turn.tool_calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = turn.tool_calls
    if PARSE_ERROR in turn.message:
        message[PARSE_ERROR] = turn.message[PARSE_ERROR]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": _finish_reason(turn),
    }
    return _completion_head(turn, "chat.completion") | {
        "choices": [choice],
        "usage": _token_usage(turn),
    }


def format_events(turn: TurnReply, request: TurnRequest) -> Iterator[bytes]:
    """Yield the reply as server-sent events."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if turn.reasoning:
        deltas.append({"reasoning_content": turn.reasoning})
    if turn.message["content"]:
        deltas.append({"content": turn.message["content"]})
    if turn.tool_calls:
        # Streaming clients assemble a call's deltas by `index`; other replies have none.
        calls = [{"index": i, **call} for i, call in enumerate(turn.tool_calls)]
        deltas.append({"tool_calls": calls})
    if PARSE_ERROR in turn.message:
        deltas.append({PARSE_ERROR: turn.message[PARSE_ERROR]})
    head = _completion_head(turn, "chat.completion.chunk")
    for delta in deltas:
        yield _encode_event(
            head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        )
    last_choice = {"index": 0, "delta": {}, "finish_reason": _finish_reason(turn)}
    yield _encode_event(head | {"choices": [last_choice]})
    if request.include_usage:  # OpenAI sends it in a last chunk, whose choices are empty
        yield _encode_event(head | {"choices": [], "usage": _token_usage(turn)})
    yield END_EVENT


def format_error(refused: RequestError) -> dict[str, Any]:
    """Return a refusal as the body of OpenAI's error."""
    entry = {"message": str(refused), "type": refused.kind, "param": refused.field}
    return {"error": entry | {"code": refused.code}}


def format_error_event(refused: RequestError) -> bytes:
    """Return an error that ends a stream which has begun."""
    return _encode_event(format_error(refused)) + END_EVENT


def as_arguments(value: Any, path: str) -> str:
    """Return a tool call's arguments as the client has written them: a JSON object, as text.

    Raises:
        RequestError: it is another value or no JSON.
    """
    try:
        is_object = isinstance(json.loads(value or "{}"), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise RequestError(f"must be a JSON object as text, got {value!r:.80}", path)
    return value or "{}"


def _read_message(body: Body) -> Message:
    role = body.take_choice("role", ("system", "developer", "user", "assistant", "tool"), None)
    body.ignore("name", "refusal", "annotations", "cache_control", "provider_specific_fields", "id")
    body.ignore(PARSE_ERROR)
    content = body.take("content", (str, list), None if role == "assistant" else NO_DEFAULT)
    text = content_text(content, body.path("content"))
    # `developer` is OpenAI's newer name of the role that chat templates call `system`.
    message = {"role": "system" if role == "developer" else role, "content": text}
    if role == "tool":
        message["tool_call_id"] = body.take("tool_call_id", str)
    if role == "assistant":
        # OpenAI has no field for the thought; servers return it under one of these names, and a
        # client that sends a reply back keeps the name.
        thought = body.take("reasoning_content", str, None)
        thought = body.take("reasoning", str, thought)
        if thought is not None:
            message["reasoning_content"] = thought
        if calls := body.take_objects("tool_calls", []):
            message["tool_calls"] = [_read_call(call) for call in calls]
    body.finish()
    return message


def _read_call(body: Body) -> dict[str, Any]:
    body.ignore("index", "provider_specific_fields")  # `index` stays in a call joined from a stream
    body.take_fixed(type="function")
    function = Body(body.take("function", dict), body.path("function"))
    call_id = body.take("id", str)
    arguments = as_arguments(function.take("arguments", str, ""), function.path("arguments"))
    call = tool_call(function.take("name", str), arguments, call_id)
    function.ignore("provider_specific_fields")
    function.finish()
    body.finish()
    return call


def _read_tool(body: Body) -> dict[str, Any]:
    body.take_choice("type", ("function",), None)
    body.ignore("cache_control")
    function = Body(body.take("function", dict), body.path("function"))
    body.finish()
    return function_tool(function, "parameters")


def function_tool(body: Body, schema: str) -> dict[str, Any]:
    """Return a tool in Chat Completions' form.

    Its option `strict` is dropped: constrained sampling would not be the policy's distribution.

    Args:
        body: the tool in the request.
        schema: the field with its parameters."""
    body.ignore("strict", "cache_control")
    function = {"name": body.take("name", str)}
    description = body.take("description", str, None)
    if description is not None:
        function["description"] = description
    parameters = body.take(schema, dict, None)
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    body.finish()
    return {"type": "function", "function": function}


def _finish_reason(turn: TurnReply) -> str:
    if turn.is_truncated:
        return "length"
    return "tool_calls" if turn.tool_calls else "stop"


def _token_usage(turn: TurnReply) -> dict[str, Any]:
    return {
        "prompt_tokens": turn.num_prompt_tokens,
        "completion_tokens": turn.num_tokens,
        "total_tokens": turn.num_prompt_tokens + turn.num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _completion_head(turn: TurnReply, kind: str) -> dict[str, Any]:
    identity = {"id": f"chatcmpl-{turn.id}", "object": kind}
    return identity | {"created": turn.created, "model": turn.model}


def _encode_event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
