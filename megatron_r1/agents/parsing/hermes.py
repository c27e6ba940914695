"""Parses answers in the form of Hermes and Qwen: reasoning, content, tool calls as JSON."""

import json
import re
import uuid
from collections.abc import Iterable
from typing import Any

from megatron_r1.agents.parsing.pool import Parsed
from megatron_r1.agents.parsing.worker import ParseJob

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class HermesParser:
    """Parses answers in the form of `parse_hermes`, in this process."""

    async def check(self) -> None:
        """Do nothing: the parser needs neither vLLM nor a process."""

    async def parse(self, job: ParseJob) -> Parsed:
        """Return what an answer contains."""
        message = parse_hermes(job.text)
        calls = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": _encodable(call["function"]["name"]),
                    "arguments": _encodable(
                        json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    ),
                },
            }
            for call in message.get("tool_calls", [])
        ]
        return Parsed(message.get("reasoning_content"), message["content"], calls)

    async def close(self) -> None:
        """Do nothing."""


def _encodable(text: str) -> str:
    """Return the text with "?" for half surrogate pairs, which a model can escape in JSON."""
    return text.encode("utf-8", "replace").decode()


def parse_hermes(text: str) -> dict[str, Any]:
    """Return an answer as a chat message. Its tool calls are {"name": …, "arguments": {…}} between
    `<tool_call>` tags, after the content; where one of them is other text, the message has no calls
    and keeps the text whole."""
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
