"""What has arrived of the push under way, and whether it is what was sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from megatron_r1.weight_sync.receive.coverage import check_coverage, first_few
from megatron_r1.weight_sync.receive.table import Delivery, Table, by_window, place
from megatron_r1.weight_sync.verify.checksum import RunningChecksum


class ReceiveBuffer:
    """Of one engine rank. deliveries[sender] are what each trainer rank brings with every push, in
    its order; a push has a number, counted from 1.

    A transport writes into `memory` and reports each delivery to `arrived`, from any thread; the
    engine waits in `wait`. Raises ValueError where the deliveries do not make up the table.
    """

    def __init__(
        self, table: Table, memory: torch.Tensor, deliveries: Mapping[int, Sequence[Delivery]]
    ):
        check_coverage(table, [d for brought in deliveries.values() for d in brought])
        self.table, self.memory, self.deliveries = table, memory, deliveries
        self.windows = {sender: by_window(table, found) for sender, found in deliveries.items()}
        # By window: how many of a sender's deliveries there are up to its end.
        self._last = {
            sender: list(accumulate(map(len, windows))) for sender, windows in self.windows.items()
        }
        self._arriving: dict[int, tuple[int, int, RunningChecksum]] = {}
        """By sender: push, index and what is known of a delivery."""
        self._push = dict.fromkeys(deliveries, 0)
        self._count = dict.fromkeys(deliveries, 0)
        self._wrong: dict[int, dict[str, None]] = {}
        """By push, the tensors; a set in order."""
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    def coming(self, sender: int, push: int, index: int, row: int) -> None:
        """The rows of deliveries[sender][index] of `push` before this one are in the memory."""
        self._checksum(sender, push, index).reach(row)

    def arrived(self, sender: int, push: int, index: int, sent: int) -> None:
        """All of it is in the memory; `sent`: the sender's checksum."""
        slot = self.table.slots[self.deliveries[sender][index].slot]
        is_right = self._checksum(sender, push, index).digest() == sent
        with self._changed:
            if not is_right:
                self._wrong.setdefault(push, {})[f"{slot.name} (from rank {sender})"] = None
            self._push[sender], self._count[sender] = push, index + 1
            self._changed.notify_all()

    def failed(self, error: Exception) -> None:
        """Nothing will arrive any more."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait(self, push: int, window: int, timeout_seconds: float) -> None:
        """Until all of `window` of `push` is there.

        Raises ValueError naming the tensors that arrived otherwise than they were sent, or the
        trainer ranks that brought nothing in time.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while late := self._late(push, window):
                left = deadline - time.monotonic()
                if self._failure is not None:
                    raise ValueError(f"push {push} broke off: {self._failure}")
                if left <= 0 or not self._changed.wait(left):
                    raise ValueError(
                        f"push {push}: after {timeout_seconds:g} s trainer ranks "
                        f"{', '.join(map(str, late))} have not brought all of it"
                    )
            wrong = list(self._wrong.get(push, ()))
        if wrong:
            raise ValueError(
                f"push {push}: {len(wrong)} tensors arrived otherwise than they were sent: "
                f"{first_few(wrong)}"
            )

    def _checksum(self, sender: int, push: int, index: int) -> RunningChecksum:
        found = self._arriving.get(sender)
        if found is None or found[:2] != (push, index):
            delivery = self.deliveries[sender][index]
            area = self.table.area(self.memory, push)
            values = place(area, self.table.slots[delivery.slot], delivery)
            self._arriving[sender] = found = (push, index, RunningChecksum(values))
        return found[2]

    def _late(self, push: int, window: int) -> list[int]:
        """Senders whose part of the window is not there."""
        return [
            sender
            for sender, last in self._last.items()
            if last[window] and (self._push[sender], self._count[sender]) < (push, last[window])
        ]
