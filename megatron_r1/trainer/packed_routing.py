"""Packs the experts that the engine has chosen, for replay, as `packed` packs the tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_r1.models.replay import RecordedRouting
from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.trainer.sample import Sample


@dataclass(frozen=True)
class RoutingPart:
    """The part of the routing that a rank replays. layers: the rank's MoE layers, as indices into
    shape.moe_layers."""

    shape: RoutingShape
    layers: list[int]


def packed_routing(
    samples: list[Sample], starts: list[int], held: Tensor, part: RoutingPart, device: torch.device
) -> RecordedRouting:
    """Return the part's routing of the packed micro-batch in which samples[i] begins at starts[i].

    held: int64, the positions of the micro-batch whose experts this rank chooses. Indices stay in
    the 1 or 2 bytes they arrived in. Raises ValueError for routing that does not fit its sample."""
    shape = part.shape
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
    return RecordedRouting(
        *(torch.from_numpy(whole[here]).to(device) for whole in (experts, known))
    )


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
