"""Which deliveries of a push are in an engine rank's memory, and whether they are correct."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from megatron_r1.push.checksum import RunningChecksum
from megatron_r1.push.protocol import Delivery, SlotTable, slot_view
from megatron_r1.push.results import IncompletePush


class Arrivals:
    """Which deliveries of the current push are in the memory of one engine rank.

    Pushes are numbered from 1. A transport writes into `memory` and reports each delivery to
    `delivery_arrived`, from any thread; the engine waits in `wait`.

    Args:
        table: the slots of this rank.
        memory: uint8, all receive buffers.
        deliveries: the deliveries of each trainer rank or `Relay`, in its order, the same in every
            push.
        is_weighted: whether checksums are weighted sums (`RunningChecksum`).

    Raises:
        ValueError: where the deliveries do not cover the table
    """

    def __init__(
        self,
        table: SlotTable,
        memory: torch.Tensor,
        deliveries: Mapping[Any, Sequence[Delivery]],
        is_weighted: bool = False,
    ):
        self._is_weighted = is_weighted
        check_coverage(table, chain.from_iterable(deliveries.values()))
        self.table, self.memory, self.deliveries = table, memory, deliveries
        self._arriving: dict[int, tuple[int, int, RunningChecksum]] = {}
        """Push, index and checksum so far of the current delivery of each sender."""
        self._push = dict.fromkeys(deliveries, 0)
        self._num_arrived = dict.fromkeys(deliveries, 0)
        """The push of each sender's last delivery, and how many of its deliveries of that push have
        arrived."""
        self.checksums: dict[tuple[Any, int], int] = {}
        """The sender's checksum of the delivery that arrived last, by sender and index."""
        self._loaded_checksums: dict[tuple[Any, int], int] = {}
        """The checksums of the push that was taken for loading last, by sender and index."""
        self._damaged: dict[int, dict[str, None]] = {}
        """The damaged tensors of each push, as an ordered set."""
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    def rows_arrived(self, sender: Any, push: int, index: int, row: int) -> None:
        """Report that the first rows of a delivery are in the memory.

        Args:
            sender: the key of the sender in `deliveries`.
            push: the number of the push.
            index: which of the sender's deliveries, from 0.
            row: the number of rows, counted from the delivery's first."""
        self._running_checksum(sender, push, index).update_to(row)

    def delivery_arrived(self, sender: Any, push: int, index: int, sent: int) -> None:
        """Report that a delivery is in the memory.

        Args:
            sender: the trainer rank or `Relay` that has sent it.
            push: the number of the push.
            index: the delivery among the sender's.
            sent: the sender's checksum."""
        slot = self.deliveries[sender][index].slot
        is_right = self._running_checksum(sender, push, index).digest() == sent
        with self._changed:
            if not is_right:
                name = f"{self.table.slots[slot].name} (from rank {sender})"
                self._damaged.setdefault(push, {})[name] = None
            self.checksums[sender, index] = sent
            self._push[sender], self._num_arrived[sender] = push, index + 1
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Report that nothing more will arrive."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @property
    def has_failed(self) -> bool:
        """Whether a push failed; no later one is accepted."""
        return self._failure is not None

    def wait(self, push: int, timeout_seconds: float, senders: Sequence[Any] | None = None) -> None:
        """Wait until all of `push` has arrived, or all that `senders` send of it.

        Raises:
            IncompletePush: the push broke off, or deliveries are late; it names their trainer
                ranks.
            ValueError: checksums differ; it names the tensors.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while late := self._late_senders(push, senders):
                left = deadline - time.monotonic()
                if self._failure is not None:
                    raise IncompletePush(f"push {push} broke off: {self._failure}")
                if left <= 0 or not self._changed.wait(left):
                    raise IncompletePush(
                        f"push {push}: after {timeout_seconds:g} s trainer ranks "
                        f"{', '.join(map(str, late))} have not sent all of it"
                    )
            damaged = list(self._damaged.get(push, ()))
        if damaged:
            raise ValueError(
                f"push {push}: {len(damaged)} tensors arrived otherwise than they were sent: "
                f"{_first_few(damaged)}"
            )

    def take_changed(self) -> set[int]:
        """Return the slots whose values differ from those of the last push that was loaded; pushes
        that were refused do not count."""
        with self._changed:
            changed = {
                self.deliveries[sender][index].slot
                for (sender, index), checksum in self.checksums.items()
                if self._loaded_checksums.get((sender, index), checksum) != checksum
            }
            self._loaded_checksums = dict(self.checksums)
        return changed

    def _running_checksum(self, sender: Any, push: int, index: int) -> RunningChecksum:
        arriving = self._arriving.get(sender)
        if arriving is None or arriving[:2] != (push, index):
            delivery = self.deliveries[sender][index]
            buffer = self.table.buffer(self.memory, push)
            values = slot_view(buffer, self.table.slots[delivery.slot], delivery)
            arriving = (push, index, RunningChecksum(values, self._is_weighted))
            self._arriving[sender] = arriving
        return arriving[2]

    def _late_senders(self, push: int, senders: Sequence[Any] | None) -> list[Any]:
        """Return those of the senders whose part of the push has not arrived."""
        return [
            sender
            for sender, deliveries in self.deliveries.items()
            if (senders is None or sender in senders)
            and (self._push[sender], self._num_arrived[sender]) < (push, len(deliveries))
        ]


def check_coverage(table: SlotTable, deliveries: Iterable[Delivery]) -> None:
    """Raise ValueError, naming tensors, where the deliveries leave out elements of a slot or hold
    some twice."""
    parts = defaultdict(list)
    for delivery in deliveries:
        parts[delivery.slot].append(delivery)
    problems = []
    for index, slot in enumerate(table.slots):
        slot_parts = parts.get(index, [])
        size = sum(part.num_elements for part in slot_parts)
        if size != slot.height * slot.width or _overlap(slot_parts):
            problems.append(f"{slot.name} ({size} of {slot.height * slot.width} elements)")
    if problems:
        raise ValueError(
            f"{len(problems)} tensors would not be sent whole and once: {_first_few(problems)}"
        )


def _first_few(tensors: Sequence[str], count: int = 5) -> str:
    return ", ".join(tensors[:count]) + (", ..." if len(tensors) > count else "")


def _overlap(parts: list[Delivery]) -> bool:
    return any(
        max(a.top, b.top) < min(a.bottom, b.bottom) and max(a.left, b.left) < min(a.right, b.right)
        for i, a in enumerate(parts)
        for b in parts[:i]
    )
