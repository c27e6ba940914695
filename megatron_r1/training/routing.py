"""Selects, from the engine's routing, the tokens and layers of a trainer rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_r1.models.replay import Recorded
from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.training.wire import Sample


@dataclass(frozen=True)
class RoutingPart:
    """The part of the routing that a rank replays.

    layers: the rank's MoE layers, as indices into shape.moe_layers; tensor_rank: its rank among the
    `tensor` ranks of sequence parallelism, which split a context rank's tokens."""

    shape: RoutingShape
    layers: list[int]
    tensor_rank: int = 0
    tensor: int = 1


def packed_routing(
    samples: list[Sample], starts: list[int], held: Tensor, part: RoutingPart, device: torch.device
) -> Recorded:
    """Return the part's routing of the packed micro-batch in which samples[i] begins at starts[i].

    held: (T,) int64, the positions of the micro-batch that this context rank has. Indices stay in
    the 1 or 2 bytes they arrived in. Raises ValueError for routing that does not fit its sample."""
    shape = part.shape
    held = held.view(part.tensor, -1)[part.tensor_rank]
    total = 1 + max([int(held.max()), *(s + len(x) for s, x in zip(starts, samples, strict=True))])
    # Experts below 32,768 look the same in int16, which torch can index; in uint16 it cannot.
    dtype = np.dtype("u1" if shape.index_bytes == 1 else "<i2")
    experts = np.zeros((total, len(part.layers), shape.topk), dtype)
    known = np.zeros(total, bool)
    for sample, start in zip(samples, starts, strict=True):
        rows = _rows(sample, shape)
        end = start + len(sample) - 1  # the last token was never fed to the engine
        experts[end - len(rows) : end] = rows[:, part.layers]
        known[end - len(rows) : end] = True
    here = held.numpy()
    return Recorded(*(torch.from_numpy(whole[here]).to(device) for whole in (experts, known)))


def _rows(sample: Sample, shape: RoutingShape) -> np.ndarray:
    """Return the routing [rows, moe layers, topk] of a sample's tokens before the last."""
    if len(sample.routing) % shape.token_bytes:
        raise ValueError(
            f"{len(sample.routing)} bytes of routing are no multiple of {shape.token_bytes}: "
            f"{len(shape.moe_layers)} layers x {shape.topk} experts x {shape.index_bytes}"
        )
    flat = np.frombuffer(sample.routing, f"<u{shape.index_bytes}")
    rows = flat.reshape(-1, len(shape.moe_layers), shape.topk)
    if len(rows) >= len(sample) and len(rows):
        raise ValueError(f"{len(rows)} rows of routing for a sample of {len(sample)} tokens")
    return rows
