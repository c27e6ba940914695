"""Reads vLLM's own replies, which are JSON with responses, log-probabilities and routed experts,
and checks them.

Of engines with our plugin samples come as bytes instead (`reply_reader`)."""

from __future__ import annotations

import base64
import binascii
import io
from array import array
from collections.abc import Sequence

import msgspec
import numpy as np

from megatron_r1.engines.server.responses import (
    NO_ROUTING,
    Response,
    VersionSpan,
    check_logprobs,
    checked_response,
    moe_routing,
)
from megatron_r1.models import sampling_mask
from megatron_r1.models.routing_shape import RoutingShape


class TokenLogprob(msgspec.Struct):
    """The log-probability of one token, as vLLM nests it."""

    logprob: float


class Logprobs(msgspec.Struct):
    """The log-probabilities of a choice, one per token."""

    content: list[TokenLogprob] | None = None


class GenerateChoice(msgspec.Struct):
    """One sampled response in vLLM's form; `parse_responses` checks it.

    Attributes:
        finish_reason: "stop", "length" or "abort".
        token_ids: the sampled tokens.
        logprobs: one entry per token.
        weight_versions: the spans of all tokens, in order.
        routed_experts: an .npy array in base64.
        sampling_mask: the kept ids of each token."""

    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    weight_versions: list[VersionSpan] | None = None
    routed_experts: str | None = None
    sampling_mask: list[list[int]] | None = None


class GenerateReply(msgspec.Struct):
    """The body of a reply of `/inference/v1/generate`: one choice per response asked for."""

    choices: list[GenerateChoice]


class PromptLogprobsReply(msgspec.Struct):
    """The body of a reply to a request for the log-probabilities of its prompt."""

    prompt_logprobs: list[dict[str, TokenLogprob] | None]
    """The log-probability of each prompt token, by the token's id; None for the first token."""


_decode_generate = msgspec.json.Decoder(GenerateReply).decode
_decode_prompt_logprobs = msgspec.json.Decoder(PromptLogprobsReply).decode


def parse_responses(
    body: bytes,
    num_prompt_tokens: int,
    routing: RoutingShape | None,
    vocab_size: int | None,
    has_mask: bool = False,
) -> list[Response]:
    """Return the responses in vLLM's reply to a generate call.

    Args:
        body: the reply's JSON.
        num_prompt_tokens: tokens of the prompt.
        routing: the shape of the routed experts; None: they were not asked for.
        vocab_size: token ids are below it; None: they are not checked.
        has_mask: whether each response needs a sampling mask.

    Raises:
        ValueError: it is malformed, a token is outside the vocabulary or, with `has_mask`, not
            among those that were kept, a log-probability is not finite, or the policy versions or
            routed experts do not cover exactly the tokens."""
    return [
        _read_choice(choice, num_prompt_tokens, routing, vocab_size, has_mask)
        for choice in _decode_generate(body).choices
    ]


def parse_prompt_logprobs(body: bytes, token_ids: Sequence[int], first: int) -> array[float]:
    """Return the log-probabilities of token_ids[first:], float32, from vLLM's reply.

    Args:
        body: the reply's JSON.
        token_ids: the tokens of the request.
        first: the index of the first token whose log-probability is returned.

    Raises:
        ValueError: the reply is malformed, has other tokens, or has a value that is not finite.
    """
    entries = _decode_prompt_logprobs(body).prompt_logprobs
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but log-probabilities of {len(entries)}")
    logprobs = array("f")
    for entry, token in zip(entries[first:], token_ids[first:], strict=True):
        token_entry = (entry or {}).get(str(token))
        if token_entry is None:
            raise ValueError(f"token {token} has no log-probability")
        logprobs.append(token_entry.logprob)
    check_logprobs(token_ids[first:], logprobs)
    return logprobs


def _read_choice(
    choice: GenerateChoice,
    num_prompt_tokens: int,
    routing: RoutingShape | None,
    vocab_size: int | None,
    has_mask: bool,
) -> Response:
    token_ids = choice.token_ids or []
    content = (choice.logprobs.content if choice.logprobs else None) or []
    if len(content) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but {len(content)} log-probabilities")
    num_tokens = num_prompt_tokens + len(token_ids)
    return checked_response(
        array("i", token_ids),
        array("f", [entry.logprob for entry in content]),
        choice.weight_versions or [],
        choice.finish_reason,
        decode_routing(choice.routed_experts, routing, num_tokens) if routing else b"",
        sampling_mask.encode_mask(choice.sampling_mask or []) if has_mask else None,
        vocab_size,
    )


def decode_routing(text: str | None, shape: RoutingShape, num_tokens: int) -> bytes:
    """Return the bytes of `moe_routing` for vLLM's routed experts: an .npy array in base64.

    Args:
        text: vLLM's field.
        shape: the sizes of the model's routing.
        num_tokens: tokens of prompt and response.

    Raises:
        ValueError: as `moe_routing`, or `text` is None or malformed.
    """
    if text is None:
        raise ValueError(NO_ROUTING)
    try:
        rows = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    except (binascii.Error, EOFError, ValueError) as error:
        raise ValueError(f"routed experts are no .npy array in base64: {error}") from None
    return moe_routing(rows, shape, num_tokens).tobytes()
