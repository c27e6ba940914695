"""One host: trainer ranks write straight into the engine rank's memory, a file in /dev/shm whose
name is gone as soon as all have mapped it, so that nothing of it outlives them.

Beside it lies a sheet for each sender: the number of the push, how many deliveries are there, and
their checksums. The receiver follows each sender with a checksum of its own, a moment behind it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_r1.landing.checksum import copy_with_checksum
from megatron_r1.landing.rendezvous import Plan
from megatron_r1.landing.table import Delivery, place
from megatron_r1.landing.transports.base import Receiver, Sender

FOLDER = Path("/dev/shm")
POLL_SECONDS = 0.002
PUSH, COUNT, SUMS = 0, 1, 2
"""Fields of a sheet of uint64: push, deliveries made, one checksum each."""


class SharedMemoryReceiver(Receiver):
    _thread: threading.Thread | None = None
    path: Path | None = None
    """Of the memory, until all have mapped it."""

    def allocate(self) -> torch.Tensor:
        self._closing = threading.Event()
        return self.reserve(self.table.areas * self.table.num_bytes)

    def reserve(self, num_bytes: int) -> torch.Tensor:
        """The memory, and in `address` what senders open it with."""
        self.path = FOLDER / _name(self.meeting.engine, self.rank)
        try:
            _reserve(self.path, num_bytes)
        except OSError as error:
            raise ValueError(
                f"{self.path}: {error.strerror}: {num_bytes / 2**30:.3g} GiB are needed "
                f"in {FOLDER}; lower push.memory_gib or make it larger"
            ) from error
        self.address = str(self.path)
        return _map(self.path, num_bytes)

    def connect(self, plans: dict[int, Plan]) -> None:
        sheets = {sender: np.memmap(plan.address, np.uint64, "r") for sender, plan in plans.items()}
        for plan in plans.values():
            Path(plan.address).unlink()
        if self.path is not None:
            self.path.unlink()
        self._thread = threading.Thread(
            target=self._follow, args=(sheets,), name="landing", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _follow(self, sheets: dict[int, np.ndarray]) -> None:
        """Check each delivery as its sender's count passes it."""
        push, done = dict.fromkeys(sheets, 0), dict.fromkeys(sheets, 0)
        try:
            while not self._closing.is_set():
                is_idle = True
                for sender, sheet in sheets.items():
                    # A sender sets its count to 0 before it begins another push.
                    now, count = int(sheet[PUSH]), int(sheet[COUNT])
                    if now != push[sender]:
                        push[sender], done[sender] = now, 0
                        count = 0 if int(sheet[PUSH]) != now else int(sheet[COUNT])
                    for index in range(done[sender], count):
                        self.inbox.arrived(sender, now, index, int(sheet[SUMS + index]))
                        is_idle = False
                    done[sender] = max(done[sender], count)
                if is_idle:
                    time.sleep(POLL_SECONDS)
        except Exception as error:
            self.inbox.failed(error)


class SharedMemorySender(Sender):
    _sheet: np.ndarray | None = None

    def plan(self, deliveries: Sequence[Delivery]) -> Plan:
        name = _name(self.meeting.engine, self.rank)
        self.address = str(FOLDER / f"{name}_from_{self.sender}")
        _reserve(Path(self.address), 8 * (SUMS + len(deliveries)))
        self._sheet = np.memmap(self.address, np.uint64, "r+")
        self._memory = self.open()
        return super().plan(deliveries)

    def open(self) -> torch.Tensor:
        """The receiver's memory."""
        return _map(Path(self.offer.address), self.table.areas * self.table.num_bytes)

    def connect(self) -> None:
        pass

    def send(self, push: int, window: int, sources: Sequence[torch.Tensor]) -> None:
        self.await_room(push, window)
        sheet = self._sheet
        if int(sheet[PUSH]) != push:
            sheet[COUNT] = 0
            sheet[PUSH] = push
        area = self.table.area(self._memory, push)
        for index in self.windows[window]:
            delivery = self.deliveries[index]
            target = place(area, self.table.slots[delivery.slot], delivery)
            sheet[SUMS + index] = copy_with_checksum(target, sources[index])
            sheet[COUNT] = index + 1

    def close(self) -> None:
        self._sheet = None
        Path(self.address).unlink(missing_ok=True)


def _name(engine: str, rank: int) -> str:
    return f"megatron_r1_{engine.replace('/', '-')}_{rank}"


def _reserve(path: Path, num_bytes: int) -> None:
    """Raises OSError, and leaves nothing behind, when there is no room."""
    with open(path, "wb") as file:
        try:
            # Not only sized: a write through a map into a full filesystem is a bus error.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError:
            path.unlink()
            raise


def _map(path: Path, num_bytes: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
