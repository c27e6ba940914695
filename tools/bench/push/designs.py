"""The designs of a push that are compared, as tasks of the fluid simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_r1.weight_sync.plan.entry import Entry
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.transports import PASSED_BYTES
from tools.bench.push.assumptions import Assumptions
from tools.bench.push.direct_links import DirectLinks
from tools.bench.push.fluid import Tasks


@dataclass(frozen=True)
class Cluster:
    """GPUs: trainer rank r has GPU r; engine rank g has GPU g, too, where `colocated`, else one of
    its own."""

    trainers: int
    receivers: int
    colocated: bool
    rates: Assumptions = Assumptions()

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
        return [
            (out, 1.0),
            (into, 1.0),
            (4 * gpus + sender, 1.0),
            (5 * gpus + target, 1.0),
        ]


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
    tasks = Tasks()
    tasks.add(
        sender,
        links.num_bytes[order],
        cluster.route(sender, receiver),
        cluster.rates.message_seconds,
    )
    return tasks


def entry_tasks(
    cluster: Cluster, plans: Sequence[tuple[range, list[list[Entry]]]], ranks_per_engine: int
) -> Tasks:
    """Return the tasks where each slice enters one engine of a set, bucket by bucket, and the ranks
    of a position exchange a bucket each per round.

    plans: the engines of each set, with `plan.entry.entries`."""
    tasks, buckets, segments = Tasks(), _Buckets(), []
    for index, (engines, plan) in enumerate(plans):
        for of_position in plan:
            segments.append(
                buckets.add(index, engines, of_position, ranks_per_engine, PASSED_BYTES)
            )
    order = np.lexsort((buckets.round, buckets.receiver, buckets.sender))
    sender, receiver = np.array(buckets.sender)[order], np.array(buckets.receiver)[order]
    _, link = np.unique(sender * cluster.receivers + receiver, return_inverse=True)
    sent = tasks.add(
        link,
        np.array(buckets.size)[order],
        cluster.route(sender, receiver),
        cluster.rates.message_seconds,
    )
    number = np.empty(len(order), int)
    number[order] = sent
    for lane, (places, sizes, ranks) in enumerate(segments, int(link.max()) + 1):
        if len(ranks) > 1:
            _exchange(tasks, cluster, lane, places, number, sizes, cluster.gpu_of(ranks))
    return tasks


def _exchange(
    tasks: Tasks,
    cluster: Cluster,
    lane: int,
    places: np.ndarray,
    number: np.ndarray,
    sizes: np.ndarray,
    gpus: np.ndarray,
) -> None:
    """Add the all-gathers of a position: rings in order of engines, one round after another.

    places, sizes: [engine, round]; a place is an index of `number`, or -1."""
    total, rates = sizes.sum(axis=0), cluster.rates
    uses: list[tuple[np.ndarray, np.ndarray | float]] = []
    for engine, gpu in enumerate(gpus):
        # A member passes on all but what its successor has brought in.
        after = sizes[(engine + 1) % len(gpus)]
        into = (total - sizes[engine]) / total
        for kind, share in ((0, (total - after) / total), (1, into), (5, into)):
            uses.append((np.full(len(total), kind * cluster.gpus + gpu), share))
    seconds = rates.round_seconds + (len(gpus) - 1) * rates.hop_seconds
    rounds = tasks.add(np.full(len(total), lane), total, uses, seconds)
    entered = places[places >= 0]
    tasks.wait(np.full(len(entered), rounds[0]), number[entered])


class _Buckets:
    """Buckets that enter, with the round in which they are exchanged."""

    def __init__(self):
        self.sender: list[int] = []
        self.receiver: list[int] = []
        self.round: list[int] = []
        self.size: list[float] = []

    def add(
        self,
        index: int,
        engines: range,
        of_position: list[Entry],
        ranks_per_engine: int,
        bucket: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the places of a position's buckets here, their sizes [engine, round], and the
        position's ranks."""
        rounds: list[list[tuple[int, float]]] = [[] for _ in engines]
        for entry in of_position:
            receiver = engines[entry.engine] * ranks_per_engine + entry.position
            count = max(1, round(entry.num_bytes / bucket))
            for _ in range(count):
                own = rounds[entry.engine]
                own.append((len(self.sender), entry.num_bytes / count))
                self.sender.append(entry.sender)
                self.receiver.append(receiver)
                self.round.append(len(own) - 1)
                self.size.append(entry.num_bytes / count)
        length = max(map(len, rounds))
        places, sizes = np.full((len(engines), length), -1), np.zeros((len(engines), length))
        for engine, own in enumerate(rounds):
            for place, (number, size) in enumerate(own):
                places[engine, place], sizes[engine, place] = number, size
        position = of_position[0].position
        return places, sizes, np.array([e * ranks_per_engine + position for e in engines])
