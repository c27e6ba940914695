"""What reads the answers of a run."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_r1.agents.hermes import parse_hermes
from megatron_r1.agents.parsing.pool import Parsed, ParserPool

IN_PROCESS = ("auto", "hermes")
"""Values of `agents.tool_parser` that need no vLLM."""


class Parses(Protocol):
    """Finds reasoning and tool calls in an answer; see `ParserPool`."""

    async def check(self) -> None: ...

    async def parse(
        self,
        text: str,
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int],
        tools: Sequence[dict[str, Any]],
    ) -> Parsed: ...

    async def close(self) -> None: ...


class HermesParser:
    """Reads `hermes.parse_hermes`'s form in this process."""

    async def check(self) -> None:
        """Return: there is nothing that could be missing."""

    async def parse(
        self,
        text: str,
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int],
        tools: Sequence[dict[str, Any]],
    ) -> Parsed:
        """Return what an answer contains; text: decoded from token_ids."""
        message = parse_hermes(text)
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
        """Return: there is nothing to end."""


def _encodable(text: str) -> str:
    """Return the text with "?" for half surrogate pairs, which a model can escape in JSON."""
    return text.encode("utf-8", "replace").decode()


def parser_of(
    tool_parser: str, reasoning_parser: str | None, tokenizer: str, num_workers: int
) -> Parses:
    """Return the parser that `agents.tool_parser` and `agents.reasoning_parser` name; tokenizer:
    its folder."""
    if tool_parser in IN_PROCESS and reasoning_parser is None:
        return HermesParser()
    name = {"auto": "hermes", "none": None}.get(tool_parser, tool_parser)
    return ParserPool(tokenizer, name, reasoning_parser, num_workers=num_workers)
