"""The pairs of ranks that a push would connect where every rank sends to every engine, for a
comparison with sets."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.tensors import CountBytes, Region
from megatron_r1.weights.rules import Shape


@dataclass(frozen=True)
class Transfer:
    """The transfer of `region` of the HF tensor `name`, which has `shape`.

    sender: global trainer rank; receiver: global engine rank. dtype: the tensor's own, or None for
    the push's."""

    name: str
    shape: Shape
    region: Region
    sender: int
    receiver: int
    dtype: str | None


@dataclass(frozen=True)
class DirectLinks:
    """The bytes from each trainer rank to each engine rank that has something from it, in the order
    of the sender's first tensor. sent: bytes by trainer rank; received: bytes by engine rank."""

    sender: np.ndarray
    receiver: np.ndarray
    num_bytes: np.ndarray
    sent: np.ndarray
    received: np.ndarray

    @property
    def busiest_sender(self) -> float:
        """The busiest trainer rank's bytes over the average of all trainer ranks."""
        return self.sent.max() / self.sent.mean()


def direct_links(planner: Planner, count_bytes: CountBytes) -> DirectLinks:
    """Return the pairs of `sends` of all ranks, computed for all of them at once."""
    engines, found = planner.engines, []
    for item, replicas, needed in planner.shared_holdings():
        if not needed:
            continue
        sizes = [count_bytes(item.name, item.rule.dtype, region) for _, region in needed]
        ranks = np.array([engines.rank(at) for at, _ in needed])
        turns = np.arange(len(needed) * engines.engines)
        sender = replicas.start + (turns + first_turn(item.name)) % len(replicas) * replicas.step
        engine, index = np.divmod(turns, len(needed))
        receiver = engine * engines.ranks_per_engine + ranks[index]
        found.append((sender * engines.num_ranks + receiver, np.array(sizes)[index]))
    pair, size = (np.concatenate(each) for each in zip(*found, strict=True))
    pairs, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
    total = np.bincount(inverse, size)
    order = np.argsort(first)
    sender, receiver = np.divmod(pairs[order], engines.num_ranks)
    total = total[order]
    sent = np.bincount(sender, total, planner.grid.world)
    return DirectLinks(
        sender, receiver, total, sent, np.bincount(receiver, total, engines.num_ranks)
    )


def sends(planner: Planner, rank: int, engine: int | None = None) -> Iterator[Transfer]:
    """Yield the transfers of trainer rank `rank`, layer by layer: ranks that hold the same part of
    a tensor take turns over the engine ranks that need it.

    engine: only the transfers to this one."""
    engines, grid = planner.engines, planner.grid
    stage, tensor = grid.stage(rank), grid.tensor_rank(rank)
    expert_tensor, expert_rank = grid.expert_coordinate(rank)
    for item in planner.held_tensors(stage, expert_rank):
        own = expert_tensor if item.expert is not None else tensor
        for held, replicas in planner.holdings(item, own):
            needed = planner.needed_parts(item, held)
            if not needed:
                continue
            first, end = 0, len(needed) * engines.engines
            if engine is not None:
                first, end = engine * len(needed), (engine + 1) * len(needed)
            turns = len(replicas)
            mine = replicas.index(rank) - first_turn(item.name)
            for turn in range(first + (mine - first) % turns, end, turns):
                to_engine, index = divmod(turn, len(needed))
                at, region = needed[index]
                receiver = engines.rank(at, to_engine)
                yield Transfer(item.name, item.shape, region, rank, receiver, item.rule.dtype)


def first_turn(name: str) -> int:
    """Return where a tensor's turns begin: otherwise the first replica would always come first."""
    return zlib.crc32(name.encode())
