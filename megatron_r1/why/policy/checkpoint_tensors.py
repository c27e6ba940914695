"""Reads tensors of checkpoints, a rectangle at a time, and checks what holds of any of them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.why.policy.checkpoint_model import MOMENT_NAMES, STATE_PREFIX, open_checkpoint
from megatron_r1.why.policy.routed_experts import ROUTER_BIAS
from megatron_r1.why.policy.tensor_source import TensorSource

MASTER = f"{STATE_PREFIX}param."
NOT_WEIGHTS = ("optimizer.", "critic_optimizer.", "critic.", "reference.")
ROUTER_BIASES = ("expert_bias", ROUTER_BIAS)
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
EMBEDDING_NAME, HEAD_NAME = "embedding.word_embeddings.weight", "output_layer.weight"


def _read_saved_rectangles(
    checkpoint: DistributedCheckpoint, key: str
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (starts, values) of the rectangles that a tensor was saved in."""
    for _, starts, sizes in checkpoint.chunks(key):
        yield starts, checkpoint.read(key, starts, sizes)


def non_finite_tensor_names(path: Path) -> list[str]:
    """Return the tensors of a checkpoint that hold a number that is not finite."""
    checkpoint = open_checkpoint(path)
    return [
        key
        for key in sorted(checkpoint.shapes)
        if checkpoint.dtypes[key].is_floating_point
        and any(
            not bool(values.isfinite().all())
            for _, values in _read_saved_rectangles(checkpoint, key)
        )
    ]


def empty_moments(path: Path, ignored_ending: str) -> tuple[list[str], int]:
    """Return the parameters whose second moments are all zero, and the number of parameters. The
    factors of a layer's routed experts count as one: an expert may get no token.

    Args:
        path: the checkpoint.
        ignored_ending: parameters whose names end so do not count; "": all count."""
    checkpoint, prefix = open_checkpoint(path), f"{STATE_PREFIX}{MOMENT_NAMES[1]}."
    is_empty: dict[str, bool] = {}
    for key in sorted(key for key in checkpoint.shapes if key.startswith(prefix)):
        if ignored_ending and key.endswith(ignored_ending):
            continue
        name = EXPERT_NUMBER.sub(".experts.", key.removeprefix(prefix))
        has_moments = any(bool(part.any()) for _, part in _read_saved_rectangles(checkpoint, key))
        is_empty[name] = is_empty.get(name, True) and not has_moments
    return [name for name, all_zero in is_empty.items() if all_zero], len(is_empty)


def masters_apart(path: Path) -> tuple[str, float]:
    """Return the weight that is furthest from the optimizer's copy of it, and the largest relative
    distance; "" where the optimizer has no copies."""
    checkpoint = open_checkpoint(path)
    worst_name, distance = "", -1.0
    for key in sorted(key for key in checkpoint.shapes if key.startswith(MASTER)):
        name = key.removeprefix(MASTER)
        if name not in checkpoint.shapes:
            continue
        gap_square = square = 0.0
        for starts, master_values in _read_saved_rectangles(checkpoint, key):
            if name in (EMBEDDING_NAME, HEAD_NAME) and starts:
                rows = min(master_values.shape[0], checkpoint.shapes[name][0] - starts[0])
                master_values = master_values[: max(0, rows)]
            weight = checkpoint.read(name, starts, master_values.shape).double()
            gap_square += float((weight - master_values.double()).square().sum())
            square += float(master_values.double().square().sum())
        relative = math.sqrt(gap_square / square) if square else math.sqrt(gap_square)
        if relative > distance:
            worst_name, distance = name, relative
    return worst_name, distance


def head_from_embedding(path: Path) -> float | None:
    """Return the relative distance of a head of its own from the embedding; None without one."""
    checkpoint = open_checkpoint(path)
    if HEAD_NAME not in checkpoint.shapes:
        return None
    rows = min(checkpoint.shapes[HEAD_NAME][0], checkpoint.shapes[EMBEDDING_NAME][0])
    sizes = (rows, *checkpoint.shapes[HEAD_NAME][1:])
    zeros = (0,) * len(sizes)
    head, embedding = (
        checkpoint.read(key, zeros, sizes).double() for key in (HEAD_NAME, EMBEDDING_NAME)
    )
    return float((head - embedding).norm() / embedding.norm())


def find_largest_change(
    before: Path, after: Path, hf_files: Path, moves_bias: bool
) -> tuple[str, float, float]:
    """Return the tensor with the largest change of a number between two checkpoints, that change,
    and the norm of all changes.

    Args:
        before: a checkpoint, or the model's folder.
        after: a later checkpoint.
        hf_files: the folder of the model's config.json.
        moves_bias: leave the routers' biases out: a rule of their own changes them."""
    worst_name, largest_change, squares = "", 0.0, 0.0
    for name, gap in _tensor_changes(before, after, hf_files):
        if not gap.numel() or (moves_bias and name.endswith(ROUTER_BIASES)):
            continue
        squares += float(gap.square().sum())
        if (largest_gap := float(gap.abs().max())) > largest_change:
            worst_name, largest_change = name, largest_gap
    return worst_name, largest_change, math.sqrt(squares)


def _tensor_changes(before: Path, after: Path, hf_files: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the changes of each tensor, float64, in parts."""
    if not (before / ".metadata").is_file():
        hf_config = read_hf_config(str(hf_files))
        source_before, source_after = (TensorSource(path, hf_config) for path in (before, after))
        for name in source_before.shapes:
            yield name, source_after.read(name).double() - source_before.read(name).double()
        return
    checkpoint_before, checkpoint_after = open_checkpoint(before), open_checkpoint(after)
    for key in sorted(checkpoint_before.shapes.keys() & checkpoint_after.shapes.keys()):
        if key.startswith(NOT_WEIGHTS) or not checkpoint_before.dtypes[key].is_floating_point:
            continue
        for starts, before_values in _read_saved_rectangles(checkpoint_before, key):
            yield (
                key,
                checkpoint_after.read(key, starts, before_values.shape).double()
                - before_values.double(),
            )
