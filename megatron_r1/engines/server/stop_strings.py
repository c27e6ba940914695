"""Truncates a response at the token that completes a stop string.

An engine has no tokenizer and cannot look for strings: it samples on to its end token or limit, and
the controller, which decodes the response, truncates it. What remains has the distribution that
stopping there would have given; what was sampled beyond costs the engine's time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_r1.engines.server.responses import Decode, Response
from megatron_r1.models import sampling_mask


def truncate_at_stop(
    response: Response, num_prompt_tokens: int, stop: Sequence[str], decode: Decode
) -> tuple[Response, str, str | None]:
    """Return the response up to the token that first completes one of `stop`, its text before that,
    and the stop string.

    Where none appears, return the whole response, its text and None. The token that completes the
    string belongs to the response, with all of its text.

    Args:
        response: its tokens and log-probabilities, and what the engine says of each.
        num_prompt_tokens: the tokens before the response, which routed experts begin with.
        stop: strings, none of them empty.
        decode: makes text of tokens.
    """
    text = decode(response.token_ids)
    matches = [(text.find(string), string) for string in stop if string in text]
    if not matches:
        return response, text, None
    start, string = min(matches, key=lambda match: (match[0] + len(match[1]), match[0]))
    low, high = 0, len(response.token_ids)  # the text of the first `high` tokens contains it
    while high - low > 1:
        middle_count = (low + high) // 2
        if string in decode(response.token_ids[:middle_count]):
            high = middle_count
        else:
            low = middle_count
    return truncate_response(response, num_prompt_tokens, high, "stop"), text[:start], string


def truncate_response(
    response: Response, num_prompt_tokens: int, count: int, finish_reason: Literal["stop", "length"]
) -> Response:
    """Return the first `count` tokens of a response.

    Args:
        response: the whole response.
        num_prompt_tokens: the tokens before the response, which routed experts begin with.
        count: the number of tokens.
        finish_reason: the result's reason to end.
    """
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
        sampling_mask=sampling_mask.slice_mask(
            response.sampling_mask, len(response.token_ids), 0, count
        ),
    )
