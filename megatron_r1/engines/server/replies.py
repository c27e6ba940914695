"""Reads the responses and scores in vLLM's replies and checks them.

Replies are JSON, with responses, scores and routed experts. Engines with our plugin
(`engines/plugin/binary_replies.py`) send samples as bytes instead: a tenth of JSON's bytes, and no
number is parsed. Such a reply, of media type `MEDIA_TYPE`, is the length of the header (uint32),
the header (JSON, `ReplyHeader`), then for each choice its token ids (int32) and log-probabilities
(float32), with a sampling mask its bytes (`models.sampling_mask`), and last the routed experts of
each choice that has some. All numbers are little-endian.
A group's routed experts, 223 MB for 16 x 30,000 tokens of DeepSeek-V3, go to a file without a name
in the folder for temporary files (`TMPDIR`), which exists as long as a response that refers to it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import mmap
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import IO

import msgspec
import numpy as np
from aiohttp import StreamReader

from megatron_r1.base.errors import RunError
from megatron_r1.engines.server.responses import Response
from megatron_r1.models import sampling_mask
from megatron_r1.models.experts import RoutingShape

# What vLLM sends for NaN and -inf (scale_out/token_in_token_out/serving.py, _clamp_logprob).
LOWEST_LOGPROB = -9999.0
NO_ROUTING = (
    "the engine returned no routed experts; start it with --enable-return-routed-experts, or set "
    "rl.routing_replay: false"
)


class TokenLogprob(msgspec.Struct):
    """The log-probability of one token, as vLLM nests it."""

    logprob: float


class Logprobs(msgspec.Struct):
    """The log-probabilities of a choice, one per token."""

    content: list[TokenLogprob] | None = None


class VersionSpan(msgspec.Struct):
    """Tokens [start, end) were sampled by weights `version`.

    Attributes:
        version: a number as text.
        start: the first token, from 0 in the response.
        end: the token after the last."""

    version: str
    start: int
    end: int


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
        _response(choice, num_prompt_tokens, routing, vocab_size, has_mask)
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
    _check_logprobs(token_ids[first:], logprobs)
    return logprobs


def _response(
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
    return _checked_response(
        array("i", token_ids),
        array("f", [entry.logprob for entry in content]),
        choice.weight_versions or [],
        choice.finish_reason,
        decode_routing(choice.routed_experts, routing, num_tokens) if routing else b"",
        sampling_mask.encode_mask(choice.sampling_mask or []) if has_mask else None,
        vocab_size,
    )


def _checked_response(
    token_ids: array[int],
    logprobs: array[float],
    spans: Iterable[VersionSpan],
    finish_reason: str | None,
    routing: bytes | memoryview,
    mask: bytes | None,
    vocab_size: int | None,
) -> Response:
    """Return a response after the checks of `parse_responses`.

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
    _check_logprobs(token_ids, logprobs)
    if mask is not None:
        sampling_mask.check_mask(mask, token_ids, vocab_size)
    ids = np.frombuffer(token_ids, np.int32)
    if vocab_size and len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"tokens {ids.min()} to {ids.max()} of {vocab_size}")
    versions = _version_per_token(spans, len(ids))
    reason = finish_reason or "abort"
    return Response(token_ids, logprobs, versions, reason, routing, sampling_mask=mask or b"")


def _check_logprobs(token_ids: Sequence[int], logprobs: array[float]) -> None:
    floats = np.frombuffer(logprobs, np.float32)
    unusable = ~(floats > LOWEST_LOGPROB) | np.isinf(floats)
    if unusable.any():
        first = int(unusable.argmax())
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


def decode_routing(text: str | None, shape: RoutingShape, num_tokens: int) -> bytes:
    """Return the bytes of `_moe_routing` for vLLM's routed experts: an .npy array in base64.

    Args:
        text: vLLM's field.
        shape: the sizes of the model's routing.
        num_tokens: tokens of prompt and response.

    Raises:
        ValueError: as `_moe_routing`, or `text` is None or malformed.
    """
    if text is None:
        raise ValueError(NO_ROUTING)
    try:
        rows = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    except (binascii.Error, EOFError, ValueError) as error:
        raise ValueError(f"routed experts are no .npy array in base64: {error}") from None
    return _moe_routing(rows, shape, num_tokens).tobytes()


def _moe_routing(rows: np.ndarray, shape: RoutingShape, num_tokens: int) -> np.ndarray:
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


MEDIA_TYPE = "application/x-megatron-r1-samples"


class Routing(msgspec.Struct):
    """A NumPy array, by its dtype and shape."""

    dtype: str
    shape: tuple[int, int, int]


class ChoiceHeader(msgspec.Struct):
    """One response of a reply, except its arrays, which follow the header as bytes.

    Attributes:
        finish_reason: "stop", "length" or "abort".
        num_tokens: tokens of the response.
        weight_versions: the spans of all tokens, in order.
        routed_experts: the array of the routed experts; None: none follows.
        sampling_mask: the bytes of the mask; None: none follows."""

    finish_reason: str
    num_tokens: int
    weight_versions: list[VersionSpan]
    routed_experts: Routing | None = None
    sampling_mask: int | None = None


class ReplyHeader(msgspec.Struct):
    """The JSON at the start of a reply, before the arrays."""

    choices: list[ChoiceHeader]


_decode = msgspec.json.Decoder(ReplyHeader).decode


async def read_responses(
    content: StreamReader,
    num_prompt_tokens: int,
    routing: RoutingShape | None,
    vocab_size: int | None,
    has_mask: bool,
    routing_slots: asyncio.Semaphore,
) -> list[Response]:
    """Read a reply's body.

    Args:
        content: the body.
        num_prompt_tokens: the tokens of the prompt.
        routing: the shape of the model's routing, if routed experts are in the reply.
        vocab_size: the size of the vocabulary.
        has_mask: whether each response needs a sampling mask.
        routing_slots: bounds the choices whose routed experts are in memory.

    Raises:
        ValueError: the body is malformed, or a response fails the checks of `_checked_response` or
            has routed experts of another shape.
        RunError: where the file cannot be written."""
    try:
        length = int.from_bytes(await content.readexactly(4), "little")
        choices = _decode(await content.readexactly(length)).choices
        tokens = [await _read_tokens(content, choice) for choice in choices]
        routings = [memoryview(b"")] * len(choices)
        if routing is not None:
            lengths = [num_prompt_tokens + choice.num_tokens for choice in choices]
            routings = await _read_routing(content, choices, lengths, routing, routing_slots)
    except asyncio.IncompleteReadError as error:
        missing = (error.expected or 0) - len(error.partial)
        raise ValueError(f"the reply ends {missing} bytes too early") from None
    return [
        _checked_response(
            *(ids, logprobs, choice.weight_versions, choice.finish_reason, rows),
            mask if has_mask else None,
            vocab_size,
        )
        for choice, (ids, logprobs, mask), rows in zip(choices, tokens, routings, strict=True)
    ]


async def _read_tokens(
    content: StreamReader, choice: ChoiceHeader
) -> tuple[array[int], array[float], bytes]:
    ids, logprobs = array("i"), array("f")
    ids.frombytes(await content.readexactly(4 * choice.num_tokens))
    logprobs.frombytes(await content.readexactly(4 * choice.num_tokens))
    return ids, logprobs, await content.readexactly(choice.sampling_mask or 0)


async def _read_routing(
    content: StreamReader,
    choices: list[ChoiceHeader],
    lengths: list[int],
    shape: RoutingShape,
    routing_slots: asyncio.Semaphore,
) -> list[memoryview]:
    """Return the rows of every choice, as views of a file.

    Args:
        content: the body, at the first choice's rows.
        choices: the headers of the choices.
        lengths: tokens of prompt and response of each choice.
        shape: the shape of the model's routing.
        routing_slots: bounds the choices whose routed experts are in memory.

    Raises:
        ValueError: a choice has no routed experts, or impossible ones.
        RunError: the file cannot be written."""
    sizes = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for choice, num_tokens in zip(choices, lengths, strict=True):
            if choice.routed_experts is None:
                raise ValueError(NO_ROUTING)
            dtype, dimensions = np.dtype(choice.routed_experts.dtype), choice.routed_experts.shape
            async with routing_slots:
                raw = await content.readexactly(dtype.itemsize * int(np.prod(dimensions)))
                rows = np.frombuffer(raw, dtype).reshape(dimensions)
                # In a thread: a write waits for the disk once the system's buffers are full.
                sizes.append(await asyncio.to_thread(_write, file, rows, shape, num_tokens))
        if not sum(sizes):
            return [memoryview(b"")] * len(sizes)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    ends = np.cumsum(sizes).tolist()
    return [mapped[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _write(file: IO[bytes], rows: np.ndarray, shape: RoutingShape, num_tokens: int) -> int:
    """Append the checked rows; return how many bytes they are.

    Args:
        file: the file, opened without a buffer.
        rows: [num_tokens - 1, layers, topk], the routed experts.
        shape: the shape of the model's routing.
        num_tokens: the tokens of prompt and response.

    Raises:
        ValueError: `rows` has another shape or impossible experts.
        RunError: the file cannot be written."""
    content = _moe_routing(rows, shape, num_tokens).reshape(-1).view(np.uint8).data
    num_written = 0
    try:
        while num_written < len(content):
            num_written += file.write(content[num_written:])
    except OSError as error:
        raise RunError(
            f"routed experts cannot be kept in {tempfile.gettempdir()} ({error}): set TMPDIR to a "
            "folder with more room, or rl.routing_replay: false, and run the same command again"
        ) from error
    return num_written
