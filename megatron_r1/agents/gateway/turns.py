"""Samples one turn: an engine's answer to prompt tokens, cut at stop strings, as a message."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_r1.agents.answers import AnswerReader, Generate, require_whole
from megatron_r1.agents.continuation import NextPrompt
from megatron_r1.agents.gateway.request import MODEL, TurnReply, TurnRequest
from megatron_r1.agents.tree import TokenTree
from megatron_r1.engine.responses import Response

Decode = Callable[[Sequence[int]], str]
Claim = Callable[[int], int]


@dataclass(frozen=True)
class TurnSampling:
    """The run's sampling of a session's turns. max_context: most tokens of a prompt and its
    answer."""

    generate: Generate
    max_context: int
    temperature: float = 1.0
    top_p: float = 1.0


class TurnSampler:
    """Samples turns and reads them as messages."""

    def __init__(self, decode: Decode, reader: AnswerReader) -> None:
        """decode: tokens of an answer to text, without the end token (`data.text.PromptText`)."""
        self._decode, self._reader = decode, reader

    async def sample(
        self,
        request: TurnRequest,
        prompt_ids: Sequence[int],
        sampling: TurnSampling,
        max_tokens: int,
        claim: Claim,
    ) -> TurnReply:
        """Sample one answer; raises what `sampling.generate` and `claim` raise.

        claim: called with the number of its tokens, returns how many of them are kept: other turns
        of the episode may have used its tokens up meanwhile."""
        response = await sampling.generate(prompt_ids, max_tokens)
        require_whole(response)
        num_prompt = len(prompt_ids)
        response, text, stop_string = cut(response, num_prompt, request.stop, self._decode)
        if (kept := claim(len(response.token_ids))) < len(response.token_ids):
            response = _first(response, num_prompt, kept, "length")
            text, stop_string = self._decode(response.token_ids), None
        message = await self._reader.read(
            text, response.token_ids, prompt_ids, request.tools, request.max_calls
        )
        model = request.model or MODEL
        return TurnReply(model, num_prompt, response, message, stop_string)


def cut(
    response: Response, num_prompt_tokens: int, stop: Sequence[str], decode: Decode
) -> tuple[Response, str, str | None]:
    """Return the response up to the token with which one of `stop` first appears, its text before
    that, and the stop string; the whole response, its text and None where none appears.

    The engine samples on beyond a stop string, as it has no tokenizer. What remains has the
    distribution that stopping there would have given."""
    text = decode(response.token_ids)
    found = [(text.find(string), string) for string in stop if string in text]
    if not found:
        return response, text, None
    at, string = min(found)
    low, high = 0, len(response.token_ids)  # the text of the first `high` tokens contains it
    while high - low > 1:
        middle = (low + high) // 2
        if string in decode(response.token_ids[:middle]):
            high = middle
        else:
            low = middle
    return _first(response, num_prompt_tokens, high, "stop"), text[:at], string


def _first(
    response: Response, num_prompt_tokens: int, count: int, finish_reason: Literal["stop", "length"]
) -> Response:
    routing = response.routing
    if routing:
        row_bytes = len(routing) // (num_prompt_tokens + len(response.token_ids) - 1)
        routing = routing[: row_bytes * (num_prompt_tokens + count - 1)]
    return replace(
        response,
        token_ids=response.token_ids[:count],
        logprobs=response.logprobs[:count],
        policy_versions=response.policy_versions[:count],
        finish_reason=finish_reason,
        routing=routing,
    )


def continue_tokens(tree: TokenTree, token_ids: list[int]) -> NextPrompt:
    """Return what to append to `tree` for a prompt that is given as tokens.

    That is what follows the longest sampled sequence that begins it, or all of it as a new
    branch."""
    asked = array("i", token_ids)
    best: int | None = None
    length = 0
    open_nodes = [(root, 0) for root in tree.children(None)]
    while open_nodes:
        number, start = open_nodes.pop()
        node = tree.nodes[number]
        end = start + len(node.token_ids)
        if asked[start:end] != node.token_ids:
            continue
        if node.is_sampled and end >= length:
            best, length = number, end
        open_nodes += [(child, end) for child in tree.children(number)]
    return NextPrompt(best, token_ids[length:], ())
