"""A sampled response in compact form, whole or up to a stop string.

Stop strings truncate a response at the token that completes one. An engine has no tokenizer and
cannot look for strings: it samples on to its end token or limit, and the controller, which decodes
the response, truncates it. What remains has the distribution that stopping there would have given;
what was sampled beyond costs the engine's time."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_r1.models import sampling_mask


@dataclass(frozen=True)
class Response:
    """One sampled response. All three arrays have one entry per token: 12 bytes, where lists of
    Python's numbers take 70 and a rollout has 2e8 tokens."""

    token_ids: array[int]
    """int32, including the stop token, if one ended it."""
    logprobs: array[float]
    """float32: log softmax(logits / temperature) of each token, after top-k, top-p and min-p."""
    policy_versions: array[int]
    """int32: the version of the weights that sampled each token."""
    finish_reason: str
    """`stop`: a stop token. `length`: max_tokens or max_model_len. `abort`: ended by a pause."""
    routing: bytes | memoryview = b""
    """If requested: indices of the experts that processed prompt and response, without the last
    token; see `json_replies.decode_routing`. A view of a file where they came as bytes."""
    engine: str = ""
    """The name of the engine that sampled it; "" where that is not known, as of several turns."""
    sampling_mask: bytes = b""
    """If requested: the tokens that the sampler kept at each position (`models.sampling_mask`)."""


Decode = Callable[[Sequence[int]], str]


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
