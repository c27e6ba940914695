"""The message of training samples to the trainer ranks: headers in msgpack, and the samples' own
bytes behind them. Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import msgspec

from megatron_r1.trainer.training_sample import Buffer, Sample

ReplicaSamples = list[list[list[Sample]]]
"""The samples of one model replica: [i][m] are those of micro-batch m of mini-batch i."""
JOINED_BYTES = 1 << 16
"""Buffers below this size are joined: a part of a message of its own costs a few microseconds."""
BUFFERS = ("token_ids", "rollout_logprobs", "teacher_logprobs", "is_sampled", "sampling_mask")
"""The fields of a `Sample` that travel behind the headers, in this order; the routing of all
samples follows, which a replica's ranks do not all need."""
Header = tuple[Sample, list[int | None], int]
"""A sample without its buffers, their sizes (None for a teacher that is None), and the size of its
routing."""


def encode_samples(samples: ReplicaSamples) -> list[Buffer]:
    """Return the parts of a message: the headers, the samples' buffers one after the other, and the
    routing of all samples.

    Not one msgpack object, which ends at 4 GiB: routing of 512 x 30,000 tokens is 7 GB."""
    headers: list[list[list[Header]]] = []
    sample_buffers: list[Buffer] = []
    routing: list[Buffer] = []
    for minibatch in samples:
        headers.append([])
        for microbatch in minibatch:
            headers[-1].append([])
            for sample in microbatch:
                buffers = [getattr(sample, name) for name in BUFFERS]
                sizes = [None if buffer is None else len(buffer) for buffer in buffers]
                bare_sample = msgspec.structs.replace(
                    sample, routing=b"", **dict.fromkeys(BUFFERS, b"")
                )
                headers[-1][-1].append((bare_sample, sizes, len(sample.routing)))
                sample_buffers += filter(None, buffers)
                routing += filter(None, [sample.routing])
    return [
        msgspec.msgpack.encode(headers),
        *_joined_buffers(sample_buffers),
        *_joined_buffers(routing),
    ]


def _joined_buffers(buffers: list[Buffer]) -> list[Buffer]:
    """Return the buffers in order, with runs of small ones joined."""
    parts: list[Buffer] = []
    for is_small, run in groupby(buffers, lambda buffer: len(buffer) < JOINED_BYTES):
        run_parts = list(run)
        parts += [b"".join(run_parts)] if is_small else run_parts
    return parts


def split_off_routing(parts: Sequence[Buffer]) -> tuple[Sequence[Buffer], Sequence[Buffer]]:
    """Return the parts of a message of `encode_samples` behind its headers: the samples' buffers,
    and their routing. Of no parts, none of either."""
    if not parts:
        return (), ()
    minibatches = msgspec.msgpack.decode(parts[0], type=list[list[list[Header]]])
    headers = (header for minibatch in minibatches for micro in minibatch for header in micro)
    bytes_left = sum(sum(filter(None, sizes)) for _, sizes, _ in headers)
    count = 1
    while bytes_left:
        bytes_left, count = bytes_left - len(parts[count]), count + 1
    return parts[1:count], parts[count:]


class _Reader:
    """Takes buffers of given sizes, as views, from parts that end where a buffer does."""

    def __init__(self, parts: Iterable[Buffer]):
        self._parts, self._remaining = iter(parts), memoryview(b"")

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes; none where there are no more parts."""
        if size and not self._remaining:
            self._remaining = memoryview(next(self._parts, b""))
        content, self._remaining = self._remaining[:size], self._remaining[size:]
        return content


def decode_samples(
    headers: Buffer, buffers: memoryview, routing: Sequence[Buffer] | None = None
) -> ReplicaSamples:
    """Return the samples that `encode_samples` encoded; they refer to `buffers` and `routing`.

    Args:
        headers: the first part of its message.
        buffers: the samples' buffers, joined, as of `split_off_routing`.
        routing: the parts behind them; none: the samples have no routing; None: it follows in
            `buffers`."""
    reader = _Reader([buffers])

    def fields(header: Header) -> dict[str, memoryview | None]:
        sizes = zip(BUFFERS, header[1], strict=True)
        return {name: None if size is None else reader.take(size) for name, size in sizes}

    minibatches = msgspec.msgpack.decode(headers, type=list[list[list[Header]]])
    bare_minibatches = [
        [[(header, fields(header)) for header in microbatch] for microbatch in minibatch]
        for minibatch in minibatches
    ]
    experts = reader if routing is None else _Reader(routing)
    return [
        [
            [
                msgspec.structs.replace(
                    header[0], routing=experts.take(header[2]), **buffers_by_name
                )
                for header, buffers_by_name in microbatch
            ]
            for microbatch in minibatch
        ]
        for minibatch in bare_minibatches
    ]
