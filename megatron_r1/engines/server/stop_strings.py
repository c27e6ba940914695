"""Stop strings: responses that are cut at the token that completes one.

An engine has no tokenizer and cannot look for strings: it samples on to its end token or limit, and
the controller, which decodes the response, cuts it. What remains has the distribution that stopping
there would have given; what was sampled beyond costs the engine's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from megatron_r1.engines.server.responses import Response

Decode = Callable[[Sequence[int]], str]


def cut(
    response: Response, num_prompt_tokens: int, stop: Sequence[str], decode: Decode
) -> tuple[Response, str, str | None]:
    """Return the response up to the token that first completes one of `stop`, its text before
    that, and the stop string; the whole response, its text and None where none appears.

    The token that completes the string belongs to the response, with all of its text."""
    text = decode(response.token_ids)
    found = [(text.find(string), string) for string in stop if string in text]
    if not found:
        return response, text, None
    at, string = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))
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
