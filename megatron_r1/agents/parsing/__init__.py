"""Reasoning and tool calls in sampled text, found by vLLM's parsers in worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from megatron_r1.agents.parsing.hermes import HermesParser
from megatron_r1.agents.parsing.pool import FAILURE, Parsed, ParserPool
from megatron_r1.agents.parsing.worker import ParseJob, tool_call

if TYPE_CHECKING:  # a worker imports this package, and needs no recipe
    from megatron_r1.config import AgentsConfig

IN_PROCESS = ("auto", "hermes")
"""Values of `agents.tool_parser` that need no vLLM."""


class Parser(Protocol):
    """Finds reasoning and tool calls in an answer: a `HermesParser` or a `ParserPool`."""

    async def check(self) -> None: ...

    async def parse(self, job: ParseJob) -> Parsed: ...

    async def close(self) -> None: ...


def parser_of(agents: AgentsConfig, tokenizer: str) -> Parser:
    """Return the parser that `agents.tool_parser` and `agents.reasoning_parser` name. tokenizer:
    folder of the model's."""
    if agents.tool_parser in IN_PROCESS and agents.reasoning_parser is None:
        return HermesParser()
    name = {"auto": "hermes", "none": None}.get(agents.tool_parser, agents.tool_parser)
    workers = agents.parser_workers
    return ParserPool(tokenizer, name, agents.reasoning_parser, num_workers=workers)
