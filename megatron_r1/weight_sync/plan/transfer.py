"""One rectangle of one tensor on its way from a trainer rank to an engine rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weights.rules import Shape


@dataclass(frozen=True)
class Transfer:
    """`region` of the HF tensor `name`, which has `shape`.

    sender: global trainer rank; receiver: global engine rank. dtype: the tensor's own, or None for
    the push's.
    """

    name: str
    shape: Shape
    region: Region
    sender: int
    receiver: int
    dtype: str | None
