"""OpenAI's Responses: POST /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_r1.agents.gateway import chat
from megatron_r1.agents.gateway.body import Body, content_text
from megatron_r1.agents.gateway.request import (
    Message,
    RequestError,
    TurnReply,
    TurnRequest,
    server_sent_event,
)
from megatron_r1.agents.parsed_turn import tool_call

CONTENT_TYPES = ("input_text", "output_text", "text")
NEUTRAL_VALUES = {"temperature": None, "top_p": None, "top_k": -1, "reasoning": None}
# max_tool_calls limits OpenAI's built-in tools, which this gateway does not have.
IGNORED_FIELDS = (*chat.IGNORED_FIELDS, "include", "stream_options", "max_tool_calls")


def parse_request(body: Body, stored: Mapping[str, list[Message]]) -> TurnRequest:
    """Return the turn that a body requests.

    Args:
        body: the request's body.
        stored: conversations by the id of their last reply.

    Raises:
        RequestError: for a body that cannot be served."""
    body.ignore(*IGNORED_FIELDS)
    model = body.take("model", str, "")
    history: list[Message] = []
    previous_id = body.take("previous_response_id", str, None)
    if previous_id is not None:
        if previous_id not in stored:
            raise RequestError(
                f"there is no response {previous_id}", "previous_response_id", status=404
            )
        history = stored[previous_id]
    sent_messages = history + _read_input(body.take("input", (str, list), []))
    chat.require_turn(sent_messages, "input")
    instructions = body.take("instructions", str, None)
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    tools = [_read_tool(tool) for tool in body.take_objects("tools", [])]
    options = body.options(NEUTRAL_VALUES)
    text = Body(body.take("text", dict, {}), "text")
    options |= {f"text.{name}": value for name, value in text.options({"verbosity": None}).items()}
    text.take_fixed(format={"type": "text"})
    text.finish()
    choice = body.take("tool_choice", (str, dict), "auto")
    if choice not in ("auto", "none"):
        options["tool_choice"] = choice
    body.take_fixed(background=False, top_logprobs=0, truncation="disabled")
    request = TurnRequest(
        system + sent_messages,
        [] if choice == "none" else tools,
        model,
        max_tokens=body.take_positive("max_output_tokens"),
        stream=body.take("stream", bool, False),
        max_calls=None if body.take("parallel_tool_calls", bool, True) else 1,
        options=options,
        # Without the system message: in OpenAI's protocol instructions are not carried over to the
        # response that continues this one.
        stored=sent_messages,
    )
    body.finish()
    return request


def format_reply(turn: TurnReply, request: TurnRequest) -> dict[str, Any]:
    """Return a turn as the body of OpenAI's response, its reasoning and calls as output items."""
    return _response_head(turn, request) | {
        "status": _turn_status(turn),
        "incomplete_details": {"reason": "max_output_tokens"} if turn.is_truncated else None,
        "output": _output_items(turn),
        "usage": _token_usage(turn),
    }


def format_events(turn: TurnReply, request: TurnRequest) -> Iterator[bytes]:
    """Yield the reply as server-sent events."""
    for number, entry in enumerate(_response_events(turn, request)):
        yield server_sent_event(entry | {"sequence_number": number})


format_error, KEEP_ALIVE = chat.format_error, chat.KEEP_ALIVE


def format_error_event(refused: RequestError) -> bytes:
    """Return an error that ends a stream which has begun."""
    entry = {"type": "error", "code": refused.code or refused.kind, "message": str(refused)}
    # 0: a turn is sampled whole before its first event, so no event has been sent.
    return server_sent_event(entry | {"param": refused.field, "sequence_number": 0})


def _read_input(value: Any) -> list[Message]:
    """Return the messages of `input`. Consecutive items of the assistant are one message: the
    protocol sends a turn's thought, text and calls as an item each, chat templates take one."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[Message] = []
    for index, item in enumerate(value):
        message = _read_item(Body(item, f"input.{index}"))
        last_message = messages[-1] if messages else None
        if message["role"] == "assistant" and last_message and last_message["role"] == "assistant":
            _join_messages(last_message, message)
        else:
            messages.append(message)
    return messages


def _join_messages(last: Message, message: Message) -> None:
    last["content"] += message["content"]
    if "reasoning_content" in message:
        thought = last.get("reasoning_content", "") + message["reasoning_content"]
        last["reasoning_content"] = thought
    if "tool_calls" in message:
        last["tool_calls"] = last.get("tool_calls", []) + message["tool_calls"]


def _read_item(body: Body) -> Message:
    # A message may leave its type out: the protocol's short form is role and content.
    kind = body.take_choice(
        "type", ("message", "function_call", "function_call_output", "reasoning"), "message"
    )
    body.ignore("id", "status")  # of an item of a reply that is sent back
    if kind == "message":
        body.ignore("phase", "name")
        roles = ("user", "assistant", "system", "developer")
        role = body.take_choice("role", roles, None)
        content = content_text(
            body.take("content", (str, list)), body.path("content"), CONTENT_TYPES
        )
        message = {"role": "system" if role == "developer" else role, "content": content}
    elif kind == "function_call":
        body.ignore("caller", "namespace")
        arguments = chat.as_arguments(body.take("arguments", str), body.path("arguments"))
        call = tool_call(body.take("name", str), arguments, body.take("call_id", str))
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
    elif kind == "function_call_output":
        output = content_text(body.take("output", (str, list)), body.path("output"), CONTENT_TYPES)
        call_id = body.take("call_id", str)
        message = {"role": "tool", "content": output, "tool_call_id": call_id}
    else:
        body.ignore("encrypted_content")
        summary = content_text(
            body.take("summary", list, []), body.path("summary"), ("summary_text",)
        )
        parts = body.take("content", list, [])
        # `content` has the whole thought, but the protocol requires the summary only.
        thought = content_text(parts, body.path("content"), ("reasoning_text",)) or summary
        message = {"role": "assistant", "content": "", "reasoning_content": thought}
    body.finish()
    return message


def _read_tool(body: Body) -> dict[str, Any]:
    body.take_choice("type", ("function",), None)
    return chat.function_tool(body, "parameters")


def _turn_status(turn: TurnReply) -> str:
    return "incomplete" if turn.is_truncated else "completed"


def _output_items(turn: TurnReply) -> list[dict[str, Any]]:
    status = _turn_status(turn)
    items: list[dict[str, Any]] = []
    if turn.reasoning is not None:
        content = [{"type": "reasoning_text", "text": turn.reasoning}]
        thought = {"type": "reasoning", "id": f"rs_{turn.id}", "summary": [], "content": content}
        items.append(thought | {"status": status})
    if turn.message["content"] or not turn.tool_calls:
        part = {"type": "output_text", "text": turn.message["content"], "annotations": []}
        message = {"type": "message", "id": f"msg_{turn.id}", "role": "assistant"}
        items.append(message | {"status": status, "content": [part]})
    for index, call in enumerate(turn.tool_calls):
        item = {"type": "function_call", "id": f"fc_{turn.id}_{index}", "call_id": call["id"]}
        items.append(item | call["function"] | {"status": "completed"})
    return items


def _response_events(turn: TurnReply, request: TurnRequest) -> Iterator[dict[str, Any]]:
    unfinished_response = _response_head(turn, request) | {
        "status": "in_progress",
        "output": [],
        "usage": None,
    }
    yield {"type": "response.created", "response": unfinished_response}
    yield {"type": "response.in_progress", "response": unfinished_response}
    for index, item in enumerate(_output_items(turn)):
        location = {"output_index": index, "item_id": item["id"]}
        empty_fields: dict[str, Any] = (
            {"arguments": ""} if item["type"] == "function_call" else {"content": []}
        )
        opened_item = item | empty_fields | {"status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": index, "item": opened_item}
        if item["type"] == "function_call":
            text = item["arguments"]
            call_fields = location | {"name": item["name"]}
            yield location | {"type": "response.function_call_arguments.delta", "delta": text}
            yield call_fields | {"type": "response.function_call_arguments.done", "arguments": text}
        else:
            yield from _part_events(location | {"content_index": 0}, item["content"][0])
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    reply = format_reply(turn, request)
    yield {"type": f"response.{reply['status']}", "response": reply}


def _part_events(location: dict[str, Any], part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind, text = part["type"], part["text"]
    logprob_fields: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
    yield location | {"type": "response.content_part.added", "part": part | {"text": ""}}
    yield location | logprob_fields | {"type": f"response.{kind}.delta", "delta": text}
    yield location | logprob_fields | {"type": f"response.{kind}.done", "text": text}
    yield location | {"type": "response.content_part.done", "part": part}


def _response_head(turn: TurnReply, request: TurnRequest) -> dict[str, Any]:
    return {
        "id": f"resp_{turn.id}",
        "object": "response",
        "created_at": turn.created,
        "model": turn.model,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": request.max_calls is None,
        "tool_choice": "auto",
        "tools": [{"type": "function", "strict": False} | t["function"] for t in request.tools],
    }


def _token_usage(turn: TurnReply) -> dict[str, Any]:
    return {
        "input_tokens": turn.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": turn.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": turn.num_prompt_tokens + turn.num_tokens,
    }
