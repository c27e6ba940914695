"""Chooses the parser of a run's answers."""

from __future__ import annotations

from typing import Protocol

from megatron_r1.agents.parsing.hermes import HermesParser
from megatron_r1.agents.parsing.pool import Parsed, ParserPool
from megatron_r1.agents.parsing.worker import ParseJob

IN_PROCESS = ("auto", "hermes")
"""Values of `agents.tool_parser` that need no vLLM."""


class Parser(Protocol):
    """Finds reasoning and tool calls in an answer: a `HermesParser` or a `ParserPool`."""

    async def check(self) -> None: ...

    async def parse(self, job: ParseJob) -> Parsed: ...

    async def close(self) -> None: ...


def parser_of(
    tool_parser: str, reasoning_parser: str | None, tokenizer: str, num_workers: int
) -> Parser:
    """Return the parser that `agents.tool_parser` and `agents.reasoning_parser` name.

    tokenizer: folder of the model's. num_workers: processes with vLLM's parsers, if they are
    needed."""
    if tool_parser in IN_PROCESS and reasoning_parser is None:
        return HermesParser()
    name = {"auto": "hermes", "none": None}.get(tool_parser, tool_parser)
    return ParserPool(tokenizer, name, reasoning_parser, num_workers=num_workers)
