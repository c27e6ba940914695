"""What a parser finds in a sampled turn, and the assistant's message made of it."""

from __future__ import annotations

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
