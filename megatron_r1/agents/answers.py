"""Sampled answers: how they are requested, and how their text becomes a chat message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_r1.agents.continuation import Continuation, arguments_of
from megatron_r1.agents.parsing import FAILURE, ParseJob, Parser
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.responses import Response


def require_whole(response: Response) -> None:
    """Raise EngineError for an answer that neither its end token nor the token limit has ended."""
    if response.finish_reason not in ("stop", "length"):
        raise EngineError(f"an engine ended a turn with {response.finish_reason!r}")


class AnswerReader:
    """Parses answers into messages that the chat template can render."""

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
        """Return the assistant's message of an answer.

        Calls that the template refuses stay text in the content, as malformed calls do, among them
        calls whose arguments are no JSON object; the message's field `tool_call_error` then says
        why. text: decoded from token_ids, without the end
        token. max_calls: tool calls that are kept."""
        job = ParseJob(text, list(token_ids), list(prompt_ids), list(tools))
        message = (await self._parser.parse(job)).message()
        calls = message.get("tool_calls", [])
        if max_calls is not None and len(calls) > max_calls:
            message["tool_calls"] = calls[:max_calls]
            message[FAILURE] = f"calls after the first {max_calls} are left out, as was asked"
        if not calls and not message["content"].strip() and "reasoning_content" not in message:
            message["content"] = text  # whatever a parser has dropped
        functions = [call["function"] for call in message.get("tool_calls", ())]
        # Parsers of vLLM keep a text or a list as arguments. No protocol has a place for these:
        # clients fail on them, or send back a call that the gateway has to refuse.
        why = "the arguments of a call are no JSON object"
        if all(isinstance(arguments_of(function), dict) for function in functions):
            if self._continuation.can_render(message, tools):
                return message
            why = "the chat template refuses the calls"
        return {"role": "assistant", "content": text, FAILURE: why}
