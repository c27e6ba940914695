"""Reads an answer's text as a chat message: reasoning, content, tool calls."""

import json
import re
from collections.abc import Iterable
from typing import Any

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def parse_hermes(text: str) -> dict[str, Any]:
    """Return an answer in the form of Hermes and Qwen: {"name": …, "arguments": {…}} between
    `<tool_call>` tags, after the content. An answer with a call that is no such JSON has none:
    its text stays whole."""
    message: dict[str, Any] = {"role": "assistant"}
    thought, is_closed, rest = text.partition("</think>")
    if is_closed:
        message["reasoning_content"] = thought.strip().removeprefix("<think>").strip()
        text = rest.lstrip()
    message["content"] = text
    calls = _calls(match[1] for match in CALL.finditer(text))
    if calls:
        message["content"] = text[: text.index("<tool_call>")].strip()
        message["tool_calls"] = calls
    return message


def _calls(bodies: Iterable[str]) -> list[dict[str, Any]]:
    """Return the calls; none if one of them is malformed."""
    calls: list[dict[str, Any]] = []
    for body in bodies:
        try:
            call = json.loads(body)
            function = {"name": call["name"], "arguments": call.get("arguments") or {}}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        if not isinstance(function["name"], str):
            return []
        calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
    return calls
