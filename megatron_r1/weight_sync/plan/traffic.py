"""The bytes that a push moves out of every trainer rank and into every engine rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_r1.weight_sync.plan.planner import Planner, first_turn
from megatron_r1.weight_sync.plan.tensors import Region
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantised

ByteCount = Callable[[str, str | None, Region], float]
"""(HF name, the tensor's own dtype or None, region) -> bytes on the wire."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def plain_bytes(dtype: str) -> ByteCount:
    """Count every tensor in `dtype`, except those that keep their own."""
    return lambda name, own, region: region.num_elements * _WIDTH[own or dtype]


def fp8_bytes(name: str, own: str | None, region: Region) -> float:
    """Count projections as float8 with an fp32 scale per 128 x 128 block, the rest in bf16."""
    if not is_quantised(name):
        return region.num_elements * _WIDTH[own or "bfloat16"]
    height, width = region.bottom - region.top, region.right - region.left
    return region.num_elements + 4 * -(-height // BLOCK) * -(-width // BLOCK)


def traffic(planner: Planner, num_bytes: ByteCount) -> Traffic:
    """Return the bytes that one push between `planner`'s layouts moves."""
    engines = planner.engines
    sent = np.zeros(planner.grid.world)
    one_engine = np.zeros(engines.ranks_per_engine)
    for item, replicas, needed in planner.shared_holdings():
        sizes = [num_bytes(item.name, item.rule.dtype, region) for _, region in needed]
        for (at, _), size in zip(needed, sizes, strict=True):
            one_engine[engines.rank(at)] += size
        first, end, turns = 0, engines.engines * len(sizes), len(replicas)
        if len(set(sizes)) == 1:  # whole rounds at once
            sent[replicas.start : replicas.stop : replicas.step] += end // turns * sizes[0]
            first = end // turns * turns
        for turn in range(first, end):
            sent[replicas[(turn + first_turn(item.name)) % turns]] += sizes[turn % len(sizes)]
    return Traffic(sent, np.tile(one_engine, engines.engines))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one push: sent[trainer rank], received[engine rank]."""

    sent: np.ndarray
    received: np.ndarray

    @property
    def busiest_sender(self) -> float:
        """The busiest trainer rank's bytes over the average of all trainer ranks."""
        return self.sent.max() / self.sent.mean()
