"""Sampled turns as chat messages: reasoning, content and tool calls of their text.

vLLM's parsers find these, in worker processes that can be killed (`parser_pool`). Turns in the
form of Hermes and Qwen, with tool calls as JSON, are parsed in this process (`hermes_parser`).
`TurnReader` makes of either's result a message that the chat template can render."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.conversation_matching import read_arguments
from megatron_r1.agents.hermes_parser import HermesParser
from megatron_r1.agents.parsed_turn import PARSE_ERROR, ParsedTurn
from megatron_r1.agents.parser_pool import ParserPool
from megatron_r1.agents.parser_worker import ParseJob
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.responses import Response

if TYPE_CHECKING:
    from megatron_r1.config import AgentsConfig


IN_PROCESS = ("auto", "hermes")
"""Values of `agents.tool_parser` that need no vLLM."""


class Parser(Protocol):
    """Finds reasoning and tool calls in a turn: a `HermesParser` or a `ParserPool`."""

    async def check(self) -> None:
        """Start what the parser needs, so that a wrong name is an error before the run."""

    async def parse(self, job: ParseJob) -> ParsedTurn:
        """Return thought, content and tool calls of the job's text."""

    async def close(self) -> None:
        """Stop the parser's processes."""


def find_parser(agents: AgentsConfig, tokenizer: str) -> Parser:
    """Return the parser that `agents.tool_parser` and `agents.reasoning_parser` name.

    Args:
        agents: the recipe's section.
        tokenizer: the folder of the model's tokenizer.
    """
    if agents.tool_parser in IN_PROCESS and agents.reasoning_parser is None:
        return HermesParser()
    name = {"auto": "hermes", "none": None}.get(agents.tool_parser, agents.tool_parser)
    workers = agents.parser_workers
    return ParserPool(tokenizer, name, agents.reasoning_parser, num_workers=workers)


def require_finished(response: Response) -> None:
    """Raise EngineError for a turn that neither its end token nor the token limit has ended."""
    if response.finish_reason not in ("stop", "length"):
        raise EngineError(f"an engine ended a turn with {response.finish_reason!r}")


class TurnReader:
    """Parses turns into messages that the chat template can render."""

    def __init__(self, parser: Parser, continuation: Continuation) -> None:
        self._parser, self._continuation = parser, continuation

    async def read(
        self,
        text: str,
        token_ids: Sequence[int],
        prompt_ids: Sequence[int],
        tools: Sequence[dict[str, Any]],
        max_calls: int | None = None,
    ) -> dict[str, Any]:
        """Return the assistant's message of a turn.

        Calls that the template refuses stay text in the content, as malformed calls do, among them
        calls whose arguments are no JSON object; the message's field `tool_call_error` then says
        why.

        Args:
            text: decoded from token_ids, without the end token.
            token_ids: the sampled tokens.
            prompt_ids: all tokens before them.
            tools: those that the prompt describes.
            max_calls: tool calls that are kept."""
        job = ParseJob(text, list(token_ids), list(prompt_ids), list(tools))
        message = (await self._parser.parse(job)).message()
        calls = message.get("tool_calls", [])
        if max_calls is not None and len(calls) > max_calls:
            message["tool_calls"] = calls[:max_calls]
            message[PARSE_ERROR] = f"calls after the first {max_calls} are left out, as was asked"
        if not calls and not message["content"].strip() and "reasoning_content" not in message:
            message["content"] = text  # a parser may have dropped all of it
        functions = [call["function"] for call in message.get("tool_calls", ())]
        # Parsers of vLLM keep a text or a list as arguments. No protocol has a place for these:
        # clients fail on them, or send back a call that the gateway has to refuse.
        reason = "the arguments of a call are no JSON object"
        if all(isinstance(read_arguments(function), dict) for function in functions):
            if self._continuation.can_render(message, tools):
                return message
            reason = "the chat template refuses the calls"
        return {"role": "assistant", "content": text, PARSE_ERROR: reason}
