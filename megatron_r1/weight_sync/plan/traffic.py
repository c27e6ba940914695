"""What a push moves: bytes out of every trainer rank and into every engine rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_r1.weight_sync.plan.plan import Planner
from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantised

ByteCount = Callable[[str, str | None, Region], float]
"""(HF name, the tensor's own dtype or None, region) -> bytes on the wire."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def plain_bytes(dtype: str) -> ByteCount:
    """Every tensor in `dtype`, but for those that keep their own."""
    return lambda name, own, region: region.size * _WIDTH[own or dtype]


def fp8_bytes(name: str, own: str | None, region: Region) -> float:
    """Projections as float8 with a fp32 scale for every 128 x 128 of them, the rest in bf16."""
    if not is_quantised(name):
        return region.size * _WIDTH[own or "bfloat16"]
    height, width = region.bottom - region.top, region.right - region.left
    return region.size + 4 * -(-height // BLOCK) * -(-width // BLOCK)


def traffic(planner: Planner, num_bytes: ByteCount) -> Traffic:
    """What one push of `planner`'s layouts moves."""
    engines = planner.engines
    sent = np.zeros(planner.grid.world)
    one_engine = np.zeros(engines.ranks_per_engine)
    for part in planner.parts():
        sizes = [num_bytes(part.name, part.dtype, region) for _, region in part.wanted]
        for (rank, _), size in zip(part.wanted, sizes, strict=True):
            one_engine[rank] += size
        turns = len(part.replicas)
        rounds, rest = divmod(engines.engines * len(sizes), turns)
        if len(set(sizes)) == 1:
            sent[_slice(part.replicas)] += rounds * sizes[0]
            first = rounds * turns
        else:
            first = 0
        for turn in range(first, first + rest if first else rounds * turns + rest):
            sent[part.replicas[(turn + part.offset) % turns]] += sizes[turn % len(sizes)]
    return Traffic(sent, np.tile(one_engine, engines.engines))


def _slice(ranks: range) -> slice:
    return slice(ranks.start, ranks.stop, ranks.step)


@dataclass(frozen=True)
class Traffic:
    """sent[trainer rank], received[engine rank]: bytes of one push."""

    sent: np.ndarray
    received: np.ndarray

    @property
    def busiest_sender(self) -> float:
        """The busiest rank's bytes over the average of all ranks."""
        return self.sent.max() / self.sent.mean()
