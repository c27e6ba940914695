"""Reads the responses in replies as bytes, and keeps their routed experts in a file.

Engines with our plugin (`engines/plugin/reply_writer.py`) send samples as bytes instead of vLLM's
JSON (`json_replies`): a tenth of its bytes, and no number is parsed. Such a reply, of media type
`MEDIA_TYPE`, is the length of the header (uint32), the header (JSON, `ReplyHeader`), then for each
choice its token ids (int32) and log-probabilities (float32), with a sampling mask its bytes
(`models.sampling_mask`), and last the routed experts of each choice that has some. All numbers are
little-endian.
A group's routed experts, 223 MB for 16 x 30,000 tokens of DeepSeek-V3, go to a file without a name
in the folder for temporary files (`TMPDIR`), which exists as long as a response that refers to it.
"""

from __future__ import annotations

import asyncio
import mmap
import tempfile
from array import array
from typing import IO

import msgspec
import numpy as np
from aiohttp import StreamReader

from megatron_r1.base.errors import RunError
from megatron_r1.engines.server.responses import (
    NO_ROUTING,
    Response,
    VersionSpan,
    checked_response,
    moe_routing,
)
from megatron_r1.models.routing_shape import RoutingShape

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


async def read_reply_body(
    content: StreamReader,
    num_prompt_tokens: int,
    routing: RoutingShape | None,
    vocab_size: int | None,
    has_mask: bool,
    routing_slots: asyncio.Semaphore,
) -> list[Response]:
    """Read a reply's body.

    Args:
        content: the stream of the body's bytes.
        num_prompt_tokens: the tokens of the prompt.
        routing: the shape of the model's routing, if routed experts are in the reply.
        vocab_size: token ids are below it; None: they are not checked.
        has_mask: whether each response needs a sampling mask.
        routing_slots: bounds the choices whose routed experts are in memory.

    Raises:
        ValueError: the body is malformed, or a response fails the checks of `checked_response` or
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
        num_missing = (error.expected or 0) - len(error.partial)
        raise ValueError(f"the reply ends {num_missing} bytes too early") from None
    return [
        checked_response(
            token_ids=ids,
            logprobs=logprobs,
            spans=choice.weight_versions,
            finish_reason=choice.finish_reason,
            routing=rows,
            mask=mask if has_mask else None,
            vocab_size=vocab_size,
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
                raw_bytes = await content.readexactly(dtype.itemsize * int(np.prod(dimensions)))
                rows = np.frombuffer(raw_bytes, dtype).reshape(dimensions)
                # In a thread: a write waits for the disk once the system's buffers are full.
                sizes.append(
                    await asyncio.to_thread(_append_routing, file, rows, shape, num_tokens)
                )
        if not sum(sizes):
            return [memoryview(b"")] * len(sizes)
        mapped_file = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    ends = np.cumsum(sizes).tolist()
    return [mapped_file[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _append_routing(file: IO[bytes], rows: np.ndarray, shape: RoutingShape, num_tokens: int) -> int:
    """Append the checked rows; return how many bytes they are.

    Args:
        file: the file, opened without a buffer.
        rows: [num_tokens - 1, layers, topk], the routed experts.
        shape: the shape of the model's routing.
        num_tokens: the tokens of prompt and response.

    Raises:
        ValueError: `rows` has another shape or impossible experts.
        RunError: the file cannot be written."""
    content = moe_routing(rows, shape, num_tokens).reshape(-1).view(np.uint8).data
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
