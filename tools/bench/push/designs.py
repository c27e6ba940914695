"""The designs of a push that are compared, as tasks of the fluid simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from megatron_r1.weight_sync.plan.engine_sets import Entry
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.transports import PASSED_BYTES
from tools.bench.push.assumptions import PushAssumptions
from tools.bench.push.direct_links import DirectLinks
from tools.bench.push.fluid import Tasks

Plans = Sequence[tuple[range, list[list[Entry]]]]
"""The engines of each set, with `plan.engine_sets.entries`."""


@dataclass(frozen=True)
class Cluster:
    """GPUs: trainer rank r has GPU r; engine rank g has GPU g, too, where `colocated`, else one of
    its own."""

    trainers: int
    receivers: int
    colocated: bool
    rates: PushAssumptions = PushAssumptions()

    @property
    def gpus(self) -> int:
        return (
            max(self.trainers, self.receivers) if self.colocated else self.trainers + self.receivers
        )

    def gpu_of(self, receiver: np.ndarray) -> np.ndarray:
        return receiver if self.colocated else receiver + self.trainers

    @cached_property
    def capacity(self) -> np.ndarray:
        """Bytes/s of every resource: out of and into the adapter, out of and into NVLink, what the
        sender and the receiver process; each by GPU."""
        rates = self.rates
        nic, nvlink = rates.nic * rates.nic_efficiency, rates.nvlink * rates.nvlink_efficiency
        by_kind = [nic, nic, nvlink, nvlink, rates.device_pack, rates.device_pack]
        return np.repeat(by_kind, self.gpus).astype(float)

    def with_host_packing(self) -> np.ndarray:
        capacity = self.capacity.copy()
        capacity[4 * self.gpus :] = self.rates.host_pack
        return capacity

    def route(
        self, sender: np.ndarray, receiver: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray | float]]:
        """Return the resources of transfers from trainer ranks to engine ranks."""
        target, gpus = self.gpu_of(receiver), self.gpus
        same_node = sender // self.rates.gpus_per_node == target // self.rates.gpus_per_node
        same_gpu = sender == target
        kind = np.where(same_node, 2, 0)
        out = np.where(same_gpu, -1, kind * gpus + sender)
        into = np.where(same_gpu, -1, (kind + 1) * gpus + target)
        return [(out, 1.0), (into, 1.0), (4 * gpus + sender, 1.0), (5 * gpus + target, 1.0)]


def direct_tasks(cluster: Cluster, planner: Planner, links: DirectLinks, rotated: bool) -> Tasks:
    """Return the tasks where each rank serves engine after engine, and in each, rank after rank.

    rotated: ranks begin with different engines, and within an engine with different ranks."""
    engines = planner.engines
    engine = links.receiver // engines.ranks_per_engine
    place = np.arange(len(engine))
    if rotated:
        first = links.sender * engines.engines // planner.grid.world
        engine = (engine - first) % engines.engines
        within = links.receiver % engines.ranks_per_engine
        place = (within - links.sender) % engines.ranks_per_engine
    order = np.lexsort((place, engine, links.sender))
    sender, receiver = links.sender[order], links.receiver[order]
    tasks, route = Tasks(), cluster.route(sender, receiver)
    tasks.add(sender, links.num_bytes[order], route, cluster.rates.message_seconds)
    return tasks


def entered_ranks(plans: Plans, ranks_per_engine: int) -> list[tuple[Entry, int]]:
    """Return every entry with the engine rank, of all engines, that it enters."""
    return [
        (entry, engines[entry.member] * ranks_per_engine + entry.position)
        for engines, plan in plans
        for entry in chain.from_iterable(plan)
    ]


def entry_tasks(cluster: Cluster, plans: Plans, ranks_per_engine: int) -> Tasks:
    """Return the tasks where each slice enters one engine of a set, bucket by bucket, and then the
    ranks of a position exchange a bucket each per round."""
    entered = sorted(
        entered_ranks(plans, ranks_per_engine), key=lambda pair: (pair[0].sender, pair[1])
    )
    entry_bytes = np.array([entry.num_bytes for entry, _ in entered])
    count = np.maximum(np.round(entry_bytes / PASSED_BYTES).astype(int), 1)
    link = np.repeat(np.arange(len(entered)), count)  # of each bucket
    receiver = np.array([receiver for _, receiver in entered])
    sender = np.array([entry.sender for entry, _ in entered])
    tasks = Tasks()
    sent = tasks.add(
        link,
        (entry_bytes / count)[link],
        cluster.route(sender[link], receiver[link]),
        cluster.rates.message_seconds,
    )
    received = np.bincount(receiver, entry_bytes, cluster.receivers)
    lane = len(entered)
    for engines, _ in plans:
        for position in range(ranks_per_engine):
            ranks = np.array(engines) * ranks_per_engine + position
            if len(ranks) > 1:
                rounds = _exchange(tasks, cluster, lane, received[ranks].max(), ranks)
                arriving = sent[np.isin(receiver[link], ranks)]
                tasks.wait(np.full(len(arriving), rounds[0]), arriving)
                lane += 1
    return tasks


def _exchange(
    tasks: Tasks, cluster: Cluster, lane: int, largest: float, ranks: np.ndarray
) -> np.ndarray:
    """Add the all-gathers of a position, and return their numbers: rings in order of engines, one
    round after another, in which every engine contributes as much as that with the largest share
    (`transports.exchange` pads them)."""
    members, rates = len(ranks), cluster.rates
    starts = np.arange(0, largest, PASSED_BYTES)
    sizes = members * np.minimum(PASSED_BYTES, largest - starts)
    uses: list[tuple[np.ndarray, np.ndarray | float]] = [
        (np.full(len(sizes), kind * cluster.gpus + gpu), (members - 1) / members)
        for gpu in cluster.gpu_of(ranks)
        for kind in (0, 1, 5)  # out of and into the adapter, and what the receiver processes
    ]
    seconds = rates.round_seconds + (members - 1) * rates.hop_seconds
    return tasks.add(np.full(len(sizes), lane), sizes, uses, seconds)
