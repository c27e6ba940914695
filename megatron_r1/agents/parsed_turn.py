"""What a parser finds in a sampled turn, the assistant's message made of it, and a call's form."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

PARSE_ERROR = "tool_call_error"
"""The field of an assistant's message that says why a call stays text."""


@dataclass(frozen=True)
class ParsedTurn:
    """The parts of one turn.

    Attributes:
        reasoning: the reasoning, None where there is none.
        content: the answer, None where there is none.
        tool_calls: the tool calls, in OpenAI's form, arguments as JSON text.
        failure: why text that looks like a call was not parsed as one, or the parser's error; "" if
            neither. Such text is in `content`."""

    reasoning: str | None
    content: str | None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def message(self) -> dict[str, Any]:
        """Return the turn as an assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or ""}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.failure:
            message[PARSE_ERROR] = self.failure
        return message


def tool_call(name: str, arguments: str, call_id: str | None = None) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, with a new id where it has none.

    Args:
        name: the tool's name.
        arguments: the call's arguments, as JSON.
        call_id: the call's id; None: a new one is made."""
    function = {"name": name, "arguments": arguments}
    call_id = call_id or f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": function}
