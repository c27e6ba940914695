"""Anthropic's Messages: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_r1.agents.conversation_matching import read_arguments
from megatron_r1.agents.gateway import chat
from megatron_r1.agents.gateway.body import Body, content_text, stop_strings
from megatron_r1.agents.gateway.request import (
    Message,
    RequestError,
    TurnReply,
    TurnRequest,
    server_sent_event,
)
from megatron_r1.agents.parsed_turn import tool_call

NEUTRAL_VALUES = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "thinking": {"type": "disabled"},
    "output_config": {},
    "speed": "standard",
}
IGNORED_FIELDS = (
    "metadata",
    "cache_control",
    "service_tier",
    "inference_geo",
    "diagnostics",
    "user_profile_id",
    "workspace_id",
)
ATTRIBUTION = "x-anthropic-billing-header"
"""The beginning of a system block of Claude Code that differs in every request; vLLM also drops
it."""
KEEP_ALIVE = b'event: ping\ndata: {"type": "ping"}\n\n'


def parse_request(body: Body, stored: object) -> TurnRequest:
    """Return the turn that a body requests.

    Args:
        body: the request's body.
        stored: not used here.

    Raises:
        RequestError: for a body that cannot be served."""
    body.ignore(*IGNORED_FIELDS)
    model = body.take("model", str, "")
    system = _system_messages(body.take("system", (str, list), None))
    sent_messages = [
        message for entry in body.take_objects("messages") for message in _read_messages(entry)
    ]
    chat.require_turn(sent_messages, "messages")
    tools = [_read_tool(tool) for tool in body.take_objects("tools", [])]
    options = body.options(NEUTRAL_VALUES)
    choice = Body(body.take("tool_choice", dict, {"type": "auto"}), "tool_choice")
    is_single = choice.take("disable_parallel_tool_use", bool, False)
    kind = choice.take_choice("type", ("auto", "any", "tool", "none"), "auto")
    if kind in ("any", "tool"):
        options["tool_choice"] = choice.take("name", str, kind)
    choice.finish()
    request = TurnRequest(
        system + sent_messages,
        [] if kind == "none" else tools,
        model,
        max_tokens=body.take_positive("max_tokens"),
        stop=stop_strings(body.take("stop_sequences", list, []), "stop_sequences"),
        stream=body.take("stream", bool, False),
        max_calls=1 if is_single else None,
        options=options,
    )
    body.finish()
    return request


def format_reply(turn: TurnReply, request: TurnRequest) -> dict[str, Any]:
    """Return a turn as the body of Anthropic's message, its thought and calls as blocks."""
    return _message_head(turn) | {
        "content": _reply_blocks(turn),
        **_stop_fields(turn),
        "usage": _token_usage(turn),
    }


def format_events(turn: TurnReply, request: TurnRequest) -> Iterator[bytes]:
    """Yield the reply as server-sent events."""
    not_stopped = {"stop_reason": None, "stop_sequence": None}
    usage = _token_usage(turn)
    message = _message_head(turn) | {
        "content": [],
        **not_stopped,
        "usage": usage | {"output_tokens": 0},
    }
    yield server_sent_event({"type": "message_start", "message": message})
    for index, block in enumerate(_reply_blocks(turn)):
        yield from map(server_sent_event, _block_events(index, block))
    yield server_sent_event({"type": "message_delta", "delta": _stop_fields(turn), "usage": usage})
    yield server_sent_event({"type": "message_stop"})


def format_error(refused: RequestError) -> dict[str, Any]:
    """Return a refusal as the body of Anthropic's error."""
    return {"type": "error", "error": {"type": refused.kind, "message": str(refused)}}


def format_error_event(refused: RequestError) -> bytes:
    """Return an error that ends a stream which has begun."""
    return server_sent_event(format_error(refused))


def _system_messages(value: str | list[Any] | None) -> list[Message]:
    if isinstance(value, list):
        value = [part for part in value if not _is_attribution(part)]
    text = content_text(value, "system")
    return [{"role": "system", "content": text}] if text else []


def _is_attribution(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("text", "")).startswith(ATTRIBUTION)


def _read_messages(body: Body) -> list[Message]:
    """Return one message of Anthropic's form as messages: a user's may hold tool results."""
    role = body.take_choice("role", ("user", "assistant", "system"), None)
    content = body.take("content", (str, list))
    body.finish()
    path = body.path("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if role == "system":
        return _system_messages(content)
    blocks = [Body(block, f"{path}.{index}") for index, block in enumerate(content)]
    return [_read_assistant_blocks(blocks)] if role == "assistant" else _read_user_blocks(blocks)


def _read_user_blocks(blocks: list[Body]) -> list[Message]:
    results: list[Message] = []
    texts: list[str] = []
    for block in blocks:
        block.ignore("cache_control", "citations")
        if block.take_choice("type", ("text", "tool_result"), None) == "text":
            texts.append(block.take("text", str))
        else:
            # An error shows in its text; OpenAI's form, which templates read, has no flag.
            block.ignore("is_error", "toolset_name")
            call_id = block.take("tool_use_id", str)
            output = content_text(block.take("content", (str, list), ""), block.path("content"))
            results.append({"role": "tool", "content": output, "tool_call_id": call_id})
        block.finish()
    # In Chat Completions' form, which templates read, a call's results follow the call at once.
    typed_messages = [{"role": "user", "content": "".join(texts)}] if texts or not results else []
    return results + typed_messages


def _read_assistant_blocks(blocks: list[Body]) -> Message:
    message: Message = {"role": "assistant", "content": ""}
    for block in blocks:
        block.ignore("cache_control", "citations", "caller", "toolset_name")
        kind = block.take_choice(
            "type", ("text", "thinking", "redacted_thinking", "tool_use"), None
        )
        if kind == "text":
            message["content"] += block.take("text", str)
        elif kind == "thinking":
            block.ignore("signature")
            thought = message.get("reasoning_content", "") + block.take("thinking", str)
            message["reasoning_content"] = thought
        elif kind == "tool_use":
            arguments = json.dumps(block.take("input", dict), ensure_ascii=False)
            call = tool_call(block.take("name", str), arguments, block.take("id", str))
            message.setdefault("tool_calls", []).append(call)
        else:
            block.ignore("data")  # encrypted by Anthropic for its own models
        block.finish()
    return message


def _read_tool(body: Body) -> dict[str, Any]:
    body.take_fixed(type="custom")
    body.ignore("allowed_callers", "defer_loading", "eager_input_streaming", "input_examples")
    return chat.function_tool(body, "input_schema")


def _reply_blocks(turn: TurnReply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if turn.reasoning is not None:
        # The protocol's thinking has a signature, which clients send back;
        # `_read_assistant_blocks` ignores it.
        blocks.append({"type": "thinking", "thinking": turn.reasoning, "signature": turn.id})
    if turn.message["content"]:
        blocks.append({"type": "text", "text": turn.message["content"]})
    for call in turn.tool_calls:
        block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}
        blocks.append(block | {"input": read_arguments(call["function"])})
    return blocks


def _block_events(index: int, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if block["type"] == "thinking":
        empty_fields: dict[str, Any] = {"thinking": "", "signature": ""}
        deltas = [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    elif block["type"] == "text":
        empty_fields = {"text": ""}
        deltas = [{"type": "text_delta", "text": block["text"]}]
    else:
        empty_fields = {"input": {}}
        text = json.dumps(block["input"], ensure_ascii=False)
        deltas = [{"type": "input_json_delta", "partial_json": text}]
    yield {"type": "content_block_start", "index": index, "content_block": block | empty_fields}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def _stop_fields(turn: TurnReply) -> dict[str, Any]:
    if turn.is_truncated:
        reason = "max_tokens"
    elif turn.stop_string is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if turn.tool_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": turn.stop_string}


def _token_usage(turn: TurnReply) -> dict[str, Any]:
    return {
        "input_tokens": turn.num_prompt_tokens,
        "output_tokens": turn.num_tokens,
        "cache_read_input_tokens": 0,
        "cache_creation_input_tokens": 0,
    }


def _message_head(turn: TurnReply) -> dict[str, Any]:
    return {"id": f"msg_{turn.id}", "type": "message", "role": "assistant", "model": turn.model}
