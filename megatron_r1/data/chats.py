"""Conversations as data sets write them, read as lists of {"role", "content"} messages.

| form | |
|---|---|
| `[{"role": "user", "content": …}]`, its keys in any order | OpenAI's |
| `[{"from": "human", "value": …}]` | ShareGPT |
| content as `[{"type": "text", "text": …}]` | OpenAI's, in parts |
| `[{"role": "model", "parts": [{"text": …}]}]` | Gemini's |
| any of these as text, JSON or Python's | SYNTHETIC-1, xlam |
| `Human: …`, `Assistant: …` with blank lines between (`read_transcript`) | HH-RLHF, Glaive |

Keys whose value is null count as absent: Arrow fills the keys of nested columns that a row lacks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from r1_grading.base.values import decode_literal

Message = dict[str, Any]
ROLE_BY_NAME = {
    **dict.fromkeys(("user", "human", "instruction", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
"""A role as data sets spell it → as chat templates do."""
SYSTEMS = ("system", "system_prompt", "systemInstruction", "system_instruction")
"""Columns with the system prompt of a row."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts")
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose text is a tool call as JSON."""
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's thought: each template reads one of them."""
KEPT_KEYS = ("tool_calls", "tool_call_id", "name", *THOUGHT_KEYS, "weight")
"""Keys of a message that templates read besides role and content."""


def read_chat(value: Any) -> list[Message] | None:
    """Return the messages of a conversation, None for any other value.

    Raises:
        ValueError: a message lacks its text, or has an unknown role; it names the message.
    """
    value = decode_literal(value)
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("messages", "conversations") if value.get(k)), None)
        value = decode_literal(value)
    if not is_chat(value):
        return None
    return [_read_message(number, message) for number, message in enumerate(value, start=1)]


TURN = re.compile(
    r"(?:\A|\n\n+)\s*(human|user|assistant|system|function response):[ \t]*", re.IGNORECASE
)
END_OF_TEXT = "<|endoftext|>"


def read_transcript(value: Any) -> list[Message] | None:
    """Return the messages of a text in which each follows `Human:` or `Assistant:`; None for any
    other text. Such a text begins with a turn that is not the assistant's, and has one that is."""
    if not isinstance(value, str):
        return None
    marks = list(TURN.finditer(value.rstrip()))
    roles = [mark[1].casefold().removesuffix(" response") for mark in marks]
    if not marks or value[: marks[0].start()].strip() or "assistant" not in roles[1:]:
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(value)]
    texts = [value[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    return [
        {"role": ROLE_BY_NAME[role], "content": text.strip().removesuffix(END_OF_TEXT).strip()}
        for role, text in zip(roles, texts, strict=True)
    ]


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages, of any of the forms but text."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(m, Mapping) and any(key in m for key in ROLE_KEYS) for m in value)
        and any(key in value[0] for key in (*CONTENT_KEYS, "tool_calls", "function_call"))
    )


def read_question(value: Any) -> tuple[list[Message], str] | None:
    """Return (the messages before the question, the question) of a text or a conversation that ends
    with a user's message; None for any other.

    Raises:
        ValueError: a message lacks its text, or has an unknown role; it names the message.
    """
    chat = read_chat(value)
    if chat is None:
        return ([], value) if isinstance(value, str) and value.strip() else None
    *messages_before, last_message = chat
    if last_message["role"] != "user" or not last_message["content"].strip():
        return None
    return messages_before, last_message["content"]


def read_system_prompt(row: Mapping[str, Any]) -> str:
    """Return the system prompt that a row has in a column of its own, "" without one."""
    for name in SYSTEMS:
        value = row.get(name)
        if isinstance(value, Mapping) and (chat := read_chat([{"role": "system", **value}])):
            value = chat[0]["content"]  # Gemini's
        if isinstance(value, str) and value.strip():
            return value.strip().removeprefix("SYSTEM:").strip()  # Glaive's
    return ""


def read_tools(value: Any) -> list[Any] | None:
    """Return the descriptions of tools that a row has, as JSON schemas; None for none."""
    value = without_nulls(decode_literal(value))
    if not isinstance(value, list) or not value:
        return None
    return [_read_tool(decode_literal(tool)) for tool in value]


def without_nulls(value: Any) -> Any:
    """Return a value without keys of null in its mappings, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(entry) for entry in value]
    return value


def tool_calls(value: Any) -> list[Message]:
    """Return calls `[{"name", "arguments"}]` or `[{"function": …}]` as OpenAI's form has them, with
    arguments as a mapping.

    Raises:
        ValueError: a call without a name.
    """
    value = decode_literal(value)
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        call = without_nulls(decode_literal(entry))
        function = decode_literal(call.get("function", call)) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{entry!r} is no tool call with a name")
        arguments = function.get("arguments", function.get("parameters", {}))
        fields = {"name": function["name"], "arguments": without_nulls(decode_literal(arguments))}
        id_field = {"id": call["id"]} if "id" in call else {}
        calls.append({**id_field, "type": "function", "function": fields})
    return calls


def _read_message(number: int, message: Mapping[str, Any]) -> Message:
    message_fields = without_nulls(message)
    role_name = next((message_fields[key] for key in ROLE_KEYS if key in message_fields), None)
    role = ROLE_BY_NAME.get(role_name.strip().casefold()) if isinstance(role_name, str) else None
    if role is None:
        raise ValueError(
            f"message {number} has role {role_name!r} (known: {', '.join(ROLE_BY_NAME)})"
        )
    content = _content_text(
        next((message_fields[key] for key in CONTENT_KEYS if key in message_fields), ""), number
    )
    chat_message: Message = {"role": role, "content": content}
    chat_message |= {key: message_fields[key] for key in KEPT_KEYS if key in message_fields}
    if role_name in CALLS:
        chat_message |= {"content": "", "tool_calls": content}
    if legacy_call := message_fields.get("function_call"):  # OpenAI's form before tool_calls
        chat_message["tool_calls"] = [*chat_message.get("tool_calls", ()), legacy_call]
    if calls := chat_message.pop("tool_calls", None):
        try:
            chat_message["tool_calls"] = tool_calls(calls)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return chat_message


def _content_text(content: Any, number: int) -> str:
    """Return the text of a message, also of one in parts."""
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else _part_text(p, number) for p in content]
        return "".join(parts)
    if isinstance(content, Mapping):
        return json.dumps(content, ensure_ascii=False)  # a tool's result
    if not isinstance(content, str):
        raise ValueError(f"message {number} must have text as its content, it is {content!r}")
    return content


def _part_text(part: Any, number: int) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(f"message {number} has a part that is no text: {kind!r}")


def _read_tool(tool: Any) -> Any:
    """Return a tool's description in OpenAI's form. xlam's is {"name", "description",
    "parameters": {argument: {"type": "str, optional", "description"}}}."""
    if not isinstance(tool, Mapping) or "name" not in tool:
        return tool
    parameters = decode_literal(tool.get("parameters", {}))
    if isinstance(parameters, Mapping) and "properties" not in parameters:
        schemas = {n: p if isinstance(p, Mapping) else {} for n, p in parameters.items()}
        required_names = [
            n
            for n, p in schemas.items()
            if "optional" not in str(p.get("type", "")) and "default" not in p
        ]
        properties = {n: {**p, "type": _json_type(p.get("type"))} for n, p in schemas.items()}
        parameters = {"type": "object", "properties": properties, "required": required_names}
    return {"type": "function", "function": {**tool, "parameters": parameters}}


JSON_TYPES = {
    **{"str": "string", "int": "integer", "float": "number", "bool": "boolean"},
    **{"list": "array", "tuple": "array", "set": "array", "dict": "object"},
}


def _json_type(name: Any) -> Any:
    """Return the JSON type of a Python type as text: "str, optional", "List[int]"."""
    if not isinstance(name, str):
        return name or "string"
    first = name.partition(",")[0].strip()
    return JSON_TYPES.get(first.partition("[")[0].casefold(), first)
