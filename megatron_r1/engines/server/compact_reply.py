"""Samples as bytes, from engines with our plugin (`engines/plugin/samples_endpoint.py`): a tenth of
JSON's bytes, and no number is parsed.

A reply of media type `MEDIA_TYPE` is the length of the header (uint32), the header (JSON,
`ReplyHeader`), then for each choice its token ids (int32) and log-probabilities (float32), and last
the routed experts of each choice that has some. All numbers are little-endian. A
group's routed experts, 223 MB for 16 x 30,000 tokens of DeepSeek-V3, go to a file without a name in
the folder for temporary files (`TMPDIR`), which exists as long as a response that refers to it."""

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
    checked,
    moe_rows,
)
from megatron_r1.models.routing_shape import RoutingShape

MEDIA_TYPE = "application/x-megatron-r1-samples"


class Routing(msgspec.Struct):
    """A NumPy array, by its dtype and shape."""

    dtype: str
    shape: tuple[int, int, int]


class ChoiceHeader(msgspec.Struct):
    """One response of a reply, except its arrays, which follow the header as bytes."""

    finish_reason: str
    num_tokens: int
    weight_versions: list[VersionSpan]
    routed_experts: Routing | None = None


class ReplyHeader(msgspec.Struct):
    """The JSON at the start of a reply, before the arrays."""

    choices: list[ChoiceHeader]


_decode = msgspec.json.Decoder(ReplyHeader).decode


async def read_responses(
    content: StreamReader,
    num_prompt_tokens: int,
    routing: RoutingShape | None,
    vocab_size: int | None,
    spilling: asyncio.Semaphore,
) -> list[Response]:
    """Read a reply's body. spilling: bounds the choices whose routed experts are in memory. Raises
    ValueError as `responses.parse_responses`, RunError where the file cannot be written."""
    try:
        length = int.from_bytes(await content.readexactly(4), "little")
        choices = _decode(await content.readexactly(length)).choices
        tokens = [await _tokens(content, choice.num_tokens) for choice in choices]
        spilled = [memoryview(b"")] * len(choices)
        if routing is not None:
            lengths = [num_prompt_tokens + choice.num_tokens for choice in choices]
            spilled = await _spilled(content, choices, lengths, routing, spilling)
    except asyncio.IncompleteReadError as error:
        missing = (error.expected or 0) - len(error.partial)
        raise ValueError(f"the reply ends {missing} bytes too early") from None
    return [
        checked(*arrays, choice.weight_versions, choice.finish_reason, rows, vocab_size)
        for choice, arrays, rows in zip(choices, tokens, spilled, strict=True)
    ]


async def _tokens(content: StreamReader, count: int) -> tuple[array[int], array[float]]:
    ids, logprobs = array("i"), array("f")
    ids.frombytes(await content.readexactly(4 * count))
    logprobs.frombytes(await content.readexactly(4 * count))
    return ids, logprobs


async def _spilled(
    content: StreamReader,
    choices: list[ChoiceHeader],
    lengths: list[int],
    shape: RoutingShape,
    spilling: asyncio.Semaphore,
) -> list[memoryview]:
    """Return the rows of every choice, as views of a file."""
    sizes = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for choice, num_tokens in zip(choices, lengths, strict=True):
            if choice.routed_experts is None:
                raise ValueError(NO_ROUTING)
            dtype, dimensions = np.dtype(choice.routed_experts.dtype), choice.routed_experts.shape
            async with spilling:
                raw = await content.readexactly(dtype.itemsize * int(np.prod(dimensions)))
                rows = np.frombuffer(raw, dtype).reshape(dimensions)
                # In a thread: a write waits for the disk once the system's buffers are full.
                sizes.append(await asyncio.to_thread(_write, file, rows, shape, num_tokens))
        if not sum(sizes):
            return [memoryview(b"")] * len(sizes)
        whole = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    ends = np.cumsum(sizes).tolist()
    return [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _write(file: IO[bytes], rows: np.ndarray, shape: RoutingShape, num_tokens: int) -> int:
    """Append the checked rows; return how many bytes they are."""
    content = moe_rows(rows, shape, num_tokens).reshape(-1).view(np.uint8).data
    done = 0
    try:
        while done < len(content):
            done += file.write(content[done:])
    except OSError as error:
        raise RunError(
            f"routed experts cannot be kept in {tempfile.gettempdir()} ({error}): set TMPDIR to a "
            "folder with more room, or rl.routing_replay: false, and run the same command again"
        ) from error
    return done
