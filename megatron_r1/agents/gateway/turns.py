"""A turn as tokens: an answer that is cut at stop strings, a prompt that is given as tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from megatron_r1.agents.continuation import NextPrompt
from megatron_r1.agents.tree import TokenTree
from megatron_r1.engine.responses import Response

Decode = Callable[[Sequence[int]], str]


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
    return first_tokens(response, num_prompt_tokens, high, "stop"), text[:at], string


def first_tokens(
    response: Response, num_prompt_tokens: int, count: int, finish_reason: Literal["stop", "length"]
) -> Response:
    """Return the first `count` tokens of a response."""
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
    """Return what to append to `tree` for a prompt that is given as tokens: the tokens after the
    longest sampled sequence with which the prompt begins, or else the whole prompt, as a new
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
