"""Compares two checkpoints tensor by tensor, at any parallel layout, in bounded memory.

A tensor tells the phase that a difference began in: moments come from the gradient, master weights
from the optimizer's step, and weights from master weights."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.commands.compare.difference import RunDifference
from megatron_r1.commands.compare.records import is_rounding
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.trainer.checkpoints.manifest import (
    MANIFEST,
    ManifestError,
    manifest_faults,
    read_manifest,
)

VOCABULARY_TENSORS = ("word_embeddings.weight", "output_layer.weight")
"""Ends of the names of tensors with a row for each token."""
PIECE_BYTES = 64 * 2**20
"""About as much of a tensor is read at a time, from each of the two."""
MOMENT_PREFIXES = ("exp_avg.", "exp_avg_sq.")
NOT_LAYOUT = ("run_state.json", "metadata.json")
"""Files whose bytes say nothing of tensors."""


def changed_files(folder: Path) -> list[str]:
    """Return the files of a checkpoint that are not as they were written, with what is wrong.

    One without a manifest was written elsewhere, so nothing is known of it."""
    if not (folder / MANIFEST).is_file():
        return []
    return manifest_faults(folder)


def are_same_files(first: Path, second: Path) -> bool:
    """Return whether both checkpoints were written with the same bytes, by their manifests; whether
    they still have them, `changed_files` tells."""
    try:
        manifests = [read_manifest(folder) for folder in (first, second)]
    except ManifestError:
        return False
    tensors = [
        {name: entry for name, entry in files.items() if name not in NOT_LAYOUT}
        for files in manifests
    ]
    return tensors[0] == tensors[1]


def compare_checkpoints(
    step: int, first: Path, second: Path, dtype: str, has_same_layout: bool
) -> list[RunDifference]:
    """Return every tensor that differs, in the order of phases, and in a phase the largest first.

    Args:
        step: the step after which both were written.
        first: the folder of one checkpoint.
        second: the folder of the other; its layout may be another.
        dtype: what the runs compute in.
        has_same_layout: compare random streams, too; another layout has others.

    Raises:
        UserError: a folder is no checkpoint, or a damaged one."""
    a, b = DistributedCheckpoint(first), DistributedCheckpoint(second)
    try:
        differences = list(_tensor_differences(step, a, b, dtype))
        if has_same_layout and a.objects == b.objects:
            differences += _different_streams(step, a, b)
    finally:
        a.close()
        b.close()
    return sorted(differences, key=lambda difference: difference.order)


def _tensor_differences(
    step: int, a: DistributedCheckpoint, b: DistributedCheckpoint, dtype: str
) -> Iterator[RunDifference]:
    for key in sorted(a.shapes.keys() | b.shapes.keys()):
        phase, name = phase_and_name(key)
        shapes = a.shapes.get(key), b.shapes.get(key)
        if not _are_alike(name, *shapes):
            first, second = ("none" if shape is None else str(shape) for shape in shapes)
            yield RunDifference(step, phase, name, (first, second), math.inf)
        elif difference := _compare_tensor(step, key, a, b, dtype):
            yield difference


def _different_streams(
    step: int, a: DistributedCheckpoint, b: DistributedCheckpoint
) -> Iterator[RunDifference]:
    for key in a.objects:
        if not _are_equal(a.read_object(key), b.read_object(key)):
            # As rng/shard_0_2, of rank 0 of two.
            rank = key.rpartition("/shard_")[2].partition("_")[0]
            name = f"{key.partition('/')[0]} of rank {rank}"
            yield RunDifference(step, "random streams", name, ("one", "another"), math.inf)


def _are_alike(name: str, first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> bool:
    """Return whether two shapes are those of one tensor: of the vocabulary's the rows may differ,
    which a layout pads to a multiple of its tensor ranks."""
    if first is None or second is None:
        return False
    is_padded = name.endswith(VOCABULARY_TENSORS) and len(first) == len(second)
    return first == second or (is_padded and first[1:] == second[1:])


def phase_and_name(key: str) -> tuple[str, str]:
    """Return the phase of a checkpoint's tensor, and its name as people say it.

    Args:
        key: as "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight"."""
    for optimizer in ("optimizer.state.", "critic_optimizer.state."):
        if key.startswith(optimizer):
            name = key.removeprefix(optimizer)
            if name.startswith(MOMENT_PREFIXES):
                return "gradient", name
            return "update", name
    if key.startswith("reference."):
        return "reference", key
    return "weights", key


def _compare_tensor(
    step: int, key: str, a: DistributedCheckpoint, b: DistributedCheckpoint, dtype: str
) -> RunDifference | None:
    """Return the difference of one tensor; None where the two are equal bit for bit.

    Args:
        step: the training step.
        key: the tensor's name.
        a: the checkpoint of one run.
        b: that of the other.
        dtype: what the runs compute in."""
    parts: dict[int, _RankPart] = {}
    rows = min(tensors.shapes[key][0] for tensors in (a, b)) if a.shapes[key] else 0
    for rank, starts, sizes in _cut_into_pieces(a.chunks(key), a.dtypes[key].itemsize, rows):
        first, second = a.read(key, starts, sizes), b.read(key, starts, sizes)
        part = parts.setdefault(rank, _RankPart())
        part.squares += float(first.double().square().sum())
        mask = _differing_bits(first, second)
        if not mask.any():
            continue
        local_indices = mask.nonzero()
        indices = local_indices + torch.tensor(starts, dtype=torch.int64)
        if not part.count:
            part.where = f"[{', '.join(map(str, indices[0].tolist()))}]"
            example_index = tuple(local_indices[0])
            part.values = _number_texts(first[example_index], second[example_index])
        part.squared_distance += float((first.double() - second.double()).square().sum())
        part.count += len(indices)
        part.other_ranks |= b.writers(key, indices)
    differing_parts = {rank: part for rank, part in parts.items() if part.count}
    if not differing_parts:
        return None
    # Where a gradient is clipped, one rank's change reaches all others, smaller.
    largest_distance = max(part.distance for part in differing_parts.values())
    largest_parts = {
        rank: part
        for rank, part in differing_parts.items()
        if part.distance >= largest_distance / 2
    }
    all_ranks = _RankPart(
        sum(part.squares for part in parts.values()),
        sum(part.squared_distance for part in differing_parts.values()),
    )
    count = sum(part.count for part in differing_parts.values())
    phase, name = phase_and_name(key)
    example = next(iter(largest_parts.values()))
    return RunDifference(
        step,
        phase,
        name,
        example.values,
        all_ranks.distance,
        is_rounding(all_ranks.distance, dtype),
        f"at {example.where}, {count:,} of {prod(a.shapes[key]):,} numbers",
        (
            sorted(largest_parts),
            sorted(set().union(*(part.other_ranks for part in largest_parts.values()))),
        ),
    )


@dataclass
class _RankPart:
    """The part of a tensor that one rank wrote.

    Attributes:
        squares: the sum of its squares in the first run.
        squared_distance: the sum of squared differences.
        count: how many numbers differ.
        where: the index of the first of them.
        values: that number in either run.
        other_ranks: the ranks that wrote the differing numbers in the second run."""

    squares: float = 0.0
    squared_distance: float = 0.0
    count: int = 0
    where: str = ""
    values: tuple[str, str] = ("", "")
    other_ranks: set[int] = field(default_factory=set)

    @property
    def distance(self) -> float:
        """The relative distance; infinite for what is not a number."""
        if not self.squared_distance:
            return 0.0
        distance = math.sqrt(self.squared_distance / self.squares) if self.squares else math.inf
        return math.inf if math.isnan(distance) else distance


Piece = tuple[int, list[int], list[int]]
"""The rank that wrote a rectangle, its starts and its sizes."""


def _cut_into_pieces(chunks: Iterable[Piece], itemsize: int, rows: int) -> Iterator[Piece]:
    """Cut chunks along their first axis into pieces of about PIECE_BYTES, up to so many rows of the
    tensor."""
    for rank, starts, sizes in chunks:
        if not sizes:  # a single number
            yield rank, starts, sizes
            continue
        size = max(1, PIECE_BYTES // max(1, prod(sizes[1:]) * itemsize))
        end = min(starts[0] + sizes[0], rows)
        for first in range(starts[0], end, size):
            yield rank, [first, *starts[1:]], [min(size, end - first), *sizes[1:]]


_BITS_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differing_bits(first: Tensor, second: Tensor) -> Tensor:
    """Return where two tensors of one dtype differ in any bit, of their shape."""
    bits = _BITS_DTYPES[first.dtype.itemsize]
    return first.contiguous().view(bits) != second.contiguous().view(bits)


def _number_texts(first: Tensor, second: Tensor) -> tuple[str, str]:
    return f"{first.double().item():.9g}", f"{second.double().item():.9g}"


def _are_equal(first: Any, second: Any) -> bool:
    """Return whether two states of random streams, trees of tensors and plain values, are equal."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        same_keys = isinstance(second, dict) and first.keys() == second.keys()
        return same_keys and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return first == second
