"""Cuts a Megatron checkpoint's tensors into chunks, and groups the chunks into files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from megatron_r1.weights.stored.dcp_writing import Chunk
from megatron_r1.weights.stored.megatron_names import Run, Slot

CHUNK_BYTES = 32 << 20
"""Largest chunk. A worker holds a few of them; Megatron loads chunks of any size."""

FILE_BYTES = 1 << 30
"""Size of a file, and so the work that a kill can lose."""


@dataclass(frozen=True)
class Piece:
    """A chunk to write and the rows of Hugging Face tensors in it.

    shape: the chunk's, without prepended axes. runs: their `start` is relative to the chunk.
    """

    chunk: Chunk
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    num_bytes: int


def cut(slot: Slot, itemsize: int) -> Iterator[Piece]:
    """Yield the parameter in pieces of whole rows, of at most CHUNK_BYTES."""
    row = prod(slot.shape[1:]) * itemsize
    step = max(1, CHUNK_BYTES // row)
    ones = (1,) * len(slot.index)
    zeros = (0,) * (len(slot.shape) - 1)
    for first in range(0, slot.shape[0], step):
        count = min(step, slot.shape[0] - first)
        shape = (count, *slot.shape[1:])
        chunk = Chunk(slot.key, (*slot.index, first, *zeros), (*ones, *shape))
        runs = tuple(_inside(slot.runs, first, first + count))
        yield Piece(chunk, shape, runs, count * row)


def _inside(runs: Iterable[Run], first: int, end: int) -> Iterator[Run]:
    for run in runs:
        start, stop = max(first, run.start), min(end, run.start + run.length)
        if start < stop:
            shift = start - run.start
            yield Run(run.hf_name, run.hf_start + shift, start - first, stop - start)


def group(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Group consecutive pieces into files of about FILE_BYTES."""
    files: list[list[Piece]] = []
    size = FILE_BYTES
    for piece in pieces:
        if size + piece.num_bytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.num_bytes
    return files
