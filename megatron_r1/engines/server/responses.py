"""A sampled response in compact form, and checks of what an engine's reply has, as JSON or as
bytes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from megatron_r1.models import sampling_mask
from megatron_r1.models.routing_shape import RoutingShape

# What vLLM sends for NaN and -inf (scale_out/token_in_token_out/serving.py, _clamp_logprob).
LOWEST_LOGPROB = -9999.0
NO_ROUTING = (
    "the engine returned no routed experts; start it with --enable-return-routed-experts, or set "
    "rl.routing_replay: false"
)


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


class VersionSpan(msgspec.Struct):
    """Tokens [start, end) were sampled by weights `version`.

    Attributes:
        version: a number as text.
        start: the first token, from 0 in the response.
        end: the token after the last."""

    version: str
    start: int
    end: int


def checked_response(
    token_ids: array[int],
    logprobs: array[float],
    spans: Iterable[VersionSpan],
    finish_reason: str | None,
    routing: bytes | memoryview,
    mask: bytes | None,
    vocab_size: int | None,
) -> Response:
    """Return a response after the checks that its form does not matter to.

    Args:
        token_ids: the sampled tokens.
        logprobs: their log-probabilities.
        spans: the policy versions of all tokens, in order.
        finish_reason: "stop", "length" or "abort"; None counts as "abort".
        routing: the checked rows of routed experts, or empty.
        mask: the kept ids of each token, in the form of `models.sampling_mask`; None if no mask was
            asked for.
        vocab_size: the size of the vocabulary; None if it is unknown.

    Raises:
        ValueError: a token is outside the vocabulary or not in `mask`, a log-probability is not
            finite, or the policy versions do not cover exactly the tokens.
    """
    check_logprobs(token_ids, logprobs)
    if mask is not None:
        sampling_mask.check_mask(mask, token_ids, vocab_size)
    ids = np.frombuffer(token_ids, np.int32)
    if vocab_size and len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"tokens {ids.min()} to {ids.max()} of {vocab_size}")
    versions = _version_per_token(spans, len(ids))
    reason = finish_reason or "abort"
    return Response(token_ids, logprobs, versions, reason, routing, sampling_mask=mask or b"")


def check_logprobs(token_ids: Sequence[int], logprobs: array[float]) -> None:
    """Raise ValueError for a log-probability that is not finite, or is what stands for one."""
    floats = np.frombuffer(logprobs, np.float32)
    is_unusable = ~(floats > LOWEST_LOGPROB) | np.isinf(floats)
    if is_unusable.any():
        first = int(is_unusable.argmax())
        raise ValueError(f"the log-probability of token {token_ids[first]} is {floats[first]}")


def _version_per_token(spans: Iterable[VersionSpan], num_tokens: int) -> array[int]:
    versions = array("i")
    for span in spans:
        if span.start != len(versions) or span.end <= span.start:
            raise ValueError(f"weight_versions do not follow each other: {spans}")
        versions += array("i", [int(span.version)]) * (span.end - span.start)
    if len(versions) != num_tokens:
        raise ValueError(f"weight_versions cover {len(versions)} of {num_tokens} tokens")
    return versions


def moe_routing(rows: np.ndarray, shape: RoutingShape, num_tokens: int) -> np.ndarray:
    """Return the routed experts of the MoE layers as indices [num_tokens - 1, MoE layers, topk] of
    shape.index_bytes bytes each.

    vLLM returns a row for every token that passed through the model: all tokens of prompt and
    response except the last, which was sampled and not fed back. A row covers every decoder layer;
    dense layers are 0 (entrypoints/scale_out/token_in_token_out/protocol.py:407, vLLM 0.32).

    Args:
        rows: vLLM's array, [num_tokens - 1, decoder layers, topk].
        shape: the sizes of the model's routing.
        num_tokens: tokens of prompt and response.

    Raises:
        ValueError: `rows` has another shape or impossible experts."""
    expected = (num_tokens - 1, shape.num_layers, shape.topk)
    if rows.shape != expected:
        raise ValueError(
            f"routed experts have shape {list(rows.shape)}, but {list(expected)} (tokens - 1, "
            "layers, topk) belong to this answer of this model"
        )
    first, last = shape.moe_layers[0], shape.moe_layers[-1]
    if shape.moe_layers == tuple(range(first, last + 1)):
        rows = np.ascontiguousarray(rows[:, first : last + 1])  # six times as fast
    else:
        rows = rows[:, list(shape.moe_layers)]
    if rows.size and int(rows.max()) >= shape.num_experts:
        raise ValueError(f"routed expert {rows.max()}, but there are {shape.num_experts}")
    if shape.topk > 1 and (rows[..., 0] == rows[..., 1]).any():
        token, layer = np.argwhere(rows[..., 0] == rows[..., 1])[0]
        raise ValueError(
            f"token {token} has expert {rows[token, layer, 0]} twice in layer "
            f"{shape.moe_layers[layer]}: the engine did not record that layer"
        )
    return np.ascontiguousarray(rows, f"<u{shape.index_bytes}")


Decode = Callable[[Sequence[int]], str]
