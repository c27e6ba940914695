"""The part of a checkpoint that holds adapters, and the model that they were trained on.

Each Hugging Face factor is one stored tensor, named as in PEFT, so that it fits any layout. The
model itself is read from `model.path` again, and compared by its fingerprint."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.build import process_groups
from megatron_r1.models.weights.adapters import adapter_factors
from megatron_r1.models.weights.layout import LayoutEntry
from megatron_r1.models.weights.splits import Shape

BASE_FINGERPRINT_KEY = "base_fingerprint"
"""The fingerprint of the model without adapters: entry of a checkpoint, attribute of a chunk."""


def sharded_adapters(chunk: Any, prefix: str) -> dict[str, ShardedTensorFactory]:
    """Return the sharded entries of a chunk's adapters by their parameters' names. The optimizer's
    state is cut into the same pieces."""
    groups, shapes = process_groups([chunk]), unwrap_model(chunk).adapter_shapes
    entries = {}
    for name, factor, entry in adapter_factors([chunk]):
        tensor = groups.expt_tp if entry.is_expert else groups.tp
        replicas = groups.expt_dp if entry.is_expert else groups.dp_cp
        entries[prefix + name] = ShardedTensorFactory(
            f"{prefix}adapters",
            factor,
            partial(_factor_pieces, entry, shapes),
            partial(_join_pieces, entry),
            (0, tensor.rank() if entry.is_replicated else 0, replicas.rank()),
        )
    return entries


def load_adapters(chunk: Any, values: dict[str, Tensor]) -> None:
    """Fill a chunk's adapters.

    Raises:
        KeyError: a name is missing or unknown.
    """
    factors = {name: factor for name, factor, _ in adapter_factors([chunk])}
    if different_names := sorted(factors.keys() ^ values.keys()):
        raise KeyError(f"missing or unknown: {different_names[:5]}")
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(values[name])


def check_base(folder: Path, written: int | None, chunks: Any) -> None:
    """Raise UserError where the checkpoint `folder` belongs to another model than the one loaded.

    Args:
        folder: the checkpoint's folder.
        written: the checkpoint's `BASE_FINGERPRINT_KEY`, None for a checkpoint of whole weights.
        chunks: this rank's chunks of the loaded model."""
    fingerprint = getattr(unwrap_model(chunks[0]), BASE_FINGERPRINT_KEY, None)
    if written == fingerprint:
        return
    if written is None or fingerprint is None:
        kinds = "whole weights", "adapters (model.lora)"
        folder_kind, recipe_kind = kinds if written is None else kinds[::-1]
        raise UserError(
            f"checkpoint {folder} holds {folder_kind}, and the recipe trains {recipe_kind}; "
            "continue with the recipe that wrote it, or start in another run.folder",
            key="model.lora",
            cause=Cause.CHANGED,
        )
    raise UserError(
        f"checkpoint {folder} holds adapters of another model: the weights that were loaded "
        f"(model.path or model.checkpoint) have the fingerprint {fingerprint:016x}, theirs had "
        f"{written:016x}; put the weights back that the run began with",
        key="model.path",
        cause=Cause.CHANGED,
    )


def _factor_pieces(
    entry: LayoutEntry,
    shapes: dict[str, Shape],
    key: str,
    factor: Tensor,
    replica: tuple[int, int, int],
    flattened: None,
) -> list[ShardedTensor]:
    """Return a factor, or a moment of it, as rectangles of Hugging Face tensors of these shapes."""
    parts = []
    for piece in entry.pieces:
        values = factor.narrow(piece.dim, piece.local_start, piece.length)
        offset = (piece.hf_start, 0) if piece.dim == 0 else (0, piece.hf_start)
        name, shape = f"{key}.{piece.hf_name}", shapes[piece.hf_name]
        # No axis_fragmentations: the runs of fused queries, keys and values are of unequal lengths.
        parts.append(
            ShardedTensor(
                name, values, values.dtype, tuple(values.shape), shape, offset, None, replica
            )
        )
    return parts


def _join_pieces(entry: LayoutEntry, pieces: list[Tensor]) -> Tensor:
    """Return the factor that consists of `pieces`; rows without one are 0."""
    factor = pieces[0].new_zeros(entry.shape)
    for piece, values in zip(entry.pieces, pieces, strict=True):
        factor.narrow(piece.dim, piece.local_start, piece.length).copy_(values)
    return factor
