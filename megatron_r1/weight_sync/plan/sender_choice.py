"""Chooses the trainer rank that sends each bundle, so that all are done at about the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from megatron_r1.weight_sync.plan.bundles import Bundle, Part
from megatron_r1.weight_sync.plan.shared_gpus import SAME_NODE_LOAD, EngineRank, SharedGPUs


class SenderChoice:
    """A greedy choice: each bundle comes from the trainer rank that is done first with it. Given
    the largest bundles first, the small ones level out what is left.

    loads: each trainer rank's load by other sets, which grows by what it is chosen for. shared: see
    `entries`."""

    def __init__(self, loads: list[float], shared: SharedGPUs):
        self._loads, self._shared = loads, shared
        self.parts: dict[EngineRank, dict[int, list[Part]]] = defaultdict(dict)
        """parts[receiver][sender]: what is sent to an engine rank by a trainer rank."""

    def add(self, bundle: Bundle, receiver: EngineRank) -> None:
        """Choose the sender of a bundle to this engine rank."""
        parts_by_sender = self.parts[receiver]
        candidates = self._candidates(bundle, receiver, parts_by_sender)
        sender = self._first_done(candidates, receiver, bundle.num_bytes)
        self._loads[sender] += self._shared.load(sender, receiver, bundle.num_bytes)
        parts_by_sender.setdefault(sender, []).extend(bundle.parts)

    def _candidates(
        self, bundle: Bundle, receiver: EngineRank, connected: Iterable[int]
    ) -> Sequence[int]:
        """Return the trainer ranks that may send a bundle. connected: the senders that the engine
        rank has already."""
        holders: Sequence[int] = bundle.replicas
        neighbor = self._shared.trainer_rank.get(receiver)
        if neighbor in holders and len(holders) > 1:
            # NCCL refuses a pair of ranks on one GPU (`SharedGPUs`).
            holders = [rank for rank in holders if rank != neighbor]
        if bundle.is_small:
            # A link costs more than its few bytes balance: with the least busy rank for every
            # bundle a rank of the recipe for 2,048 GPUs had 17 links, not 5 (docs/log.md).
            return [rank for rank in connected if rank in holders] or holders
        return holders

    def _first_done(self, candidates: Sequence[int], receiver: EngineRank, num_bytes: int) -> int:
        """Return the candidate that has sent `num_bytes` more to the engine rank first."""
        loads = self._loads
        sender = min(candidates, key=loads.__getitem__)
        near = self._shared.in_its_node(candidates, receiver)
        if not near:
            return sender
        # Within the node bytes take less of a rank's time, so a busier rank may be done first: at
        # 2,048 GPUs a push takes 1.19 times its floor instead of 1.21 (docs/log.md).
        nearest = min(near, key=loads.__getitem__)
        saved = (1 - SAME_NODE_LOAD) * num_bytes
        return nearest if loads[nearest] < loads[sender] + saved else sender
