"""One host: trainer ranks write straight into the engine rank's memory (`named_memory`).

Beside it lies a sheet for each sender: the number of the push, how many of its bytes are there, and
the checksums of the deliveries that are. The receiver follows each sender with a checksum of its
own, so that it is done a moment after the last of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from megatron_r1.weight_sync.receive.buffer import ReceiveBuffer
from megatron_r1.weight_sync.receive.rendezvous import Plan
from megatron_r1.weight_sync.receive.table import Delivery, place
from megatron_r1.weight_sync.transports.base import Receiver, Sender
from megatron_r1.weight_sync.transports.named_memory import (
    FOLDER,
    PREFIX,
    NamedMemory,
    map_bytes,
    sweep,
)
from megatron_r1.weight_sync.verify.checksum import copy_with_checksum
from megatron_r1.weight_sync.verify.lanes import order

POLL_SECONDS = 0.002
FOLLOW_SECONDS = 0.0001
"""Between looks at the sheets, and while a push is under way."""
PUSH, DONE, SUMS = 0, 1, 2
"""Fields of a sheet of uint64: push, bytes of it that are there, one checksum for each delivery."""


class SharedMemoryReceiver(Receiver):
    _thread: threading.Thread | None = None
    _file: NamedMemory | None = None

    def allocate(self) -> torch.Tensor:
        self._closing = threading.Event()
        return self.reserve(self.table.areas * self.table.num_bytes)

    def reserve(self, num_bytes: int) -> torch.Tensor:
        """The memory, and in `address` what senders open it with."""
        sweep()
        path = FOLDER / _name(self.meeting.engine, self.rank)
        try:
            self._file = NamedMemory(path, num_bytes)
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}: {num_bytes / 2**30:.3g} GiB are needed "
                f"in {FOLDER}; lower push.memory_gib or make it larger"
            ) from error
        self.address = str(path)
        return map_bytes(path, num_bytes)

    def connect(self, plans: dict[int, Plan]) -> None:
        sheets = {sender: np.memmap(plan.address, np.uint64, "r") for sender, plan in plans.items()}
        for plan in plans.values():
            Path(plan.address).unlink()
        if self._file is not None:
            self._file.close()
        self._thread = threading.Thread(
            target=self._follow, args=(sheets,), name="landing", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            self._file.close()

    def _follow(self, sheets: dict[int, np.ndarray]) -> None:
        """Check what each sender brings as it comes."""
        followed = [_Followed(sender, sheet, self.inbox) for sender, sheet in sheets.items()]
        try:
            while not self._closing.is_set():
                # Of all, and not of any: each has its turn.
                if not sum(sender.follow() for sender in followed):
                    under_way = any(sender.is_under_way for sender in followed)
                    time.sleep(FOLLOW_SECONDS if under_way else POLL_SECONDS)
        except Exception as error:
            self.inbox.failed(error)


class _Followed:
    """A sender, as its receiver sees it."""

    def __init__(self, sender: int, sheet: np.ndarray, inbox: ReceiveBuffer):
        self.sender, self.sheet, self.inbox = sender, sheet, inbox
        deliveries = inbox.deliveries[sender]
        self.row_bytes = [delivery.row_bytes(inbox.table) for delivery in deliveries]
        self.ends = list(accumulate(delivery.num_bytes(inbox.table) for delivery in deliveries))
        self.starts = [0, *self.ends[:-1]]
        self.push = self.index = self.seen = 0

    @property
    def is_under_way(self) -> bool:
        return bool(self.seen) and self.index < len(self.ends)

    def follow(self) -> bool:
        """Check what has come since; whether anything has."""
        push, done = int(self.sheet[PUSH]), int(self.sheet[DONE])
        if push != self.push:
            # A sender sets its count to 0 before it begins another push.
            self.push, self.index, self.seen = push, 0, 0
            done = int(self.sheet[DONE]) if int(self.sheet[PUSH]) == push else 0
        if done <= self.seen:
            return False
        order()
        while self.index < len(self.ends) and self.ends[self.index] <= done:
            sent = int(self.sheet[SUMS + self.index])
            self.inbox.arrived(self.sender, push, self.index, sent)
            self.index += 1
        if self.index < len(self.ends) and done > self.starts[self.index]:
            row = (done - self.starts[self.index]) // self.row_bytes[self.index]
            self.inbox.coming(self.sender, push, self.index, row)
        self.seen = done
        return True


class SharedMemorySender(Sender):
    _sheet: np.ndarray | None = None
    _file: NamedMemory | None = None

    def plan(self, deliveries: Sequence[Delivery]) -> Plan:
        name = _name(self.meeting.engine, self.rank)
        self.address = str(FOLDER / f"{name}_from_{self.sender}")
        self._file = NamedMemory(Path(self.address), 8 * (SUMS + len(deliveries)))
        self._sheet = np.memmap(self.address, np.uint64, "r+")
        self._memory = self.open()
        self._views: dict[int, list[torch.Tensor]] = {}
        return super().plan(deliveries)

    def open(self) -> torch.Tensor:
        """The receiver's memory."""
        return map_bytes(Path(self.offer.address), self.table.areas * self.table.num_bytes)

    def connect(self) -> None:
        pass

    def send(self, push: int, window: int, sources: Sequence[torch.Tensor]) -> None:
        self.await_room(push, window)
        sheet = self._sheet
        if int(sheet[PUSH]) != push:
            sheet[DONE] = 0
            sheet[PUSH] = push
        targets, done = self._targets(push), int(sheet[DONE])
        for index in self.windows[window]:
            delivery = self.deliveries[index]
            row_bytes = delivery.row_bytes(self.table)

            def written(row: int, start: int = done, row_bytes: int = row_bytes) -> None:
                order()
                sheet[DONE] = start + row * row_bytes

            sheet[SUMS + index] = copy_with_checksum(targets[index], sources[index], written)
            order()
            sheet[DONE] = done = done + delivery.num_bytes(self.table)

    def _targets(self, push: int) -> list[torch.Tensor]:
        """Where each delivery of this push goes."""
        at = push % self.table.areas
        if at not in self._views:
            area, slots = self.table.area(self._memory, push), self.table.slots
            self._views[at] = [place(area, slots[d.slot], d) for d in self.deliveries]
        return self._views[at]

    def close(self) -> None:
        self._sheet = None
        if self._file is not None:
            self._file.close()


def _name(engine: str, rank: int) -> str:
    return f"{PREFIX}{engine.replace('/', '-')}_{rank}"
