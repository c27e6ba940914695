"""One host: trainer ranks write straight into the engine rank's memory, a file in /dev/shm whose
name is gone as soon as all have mapped it, so that nothing of it outlives them. Who makes a file
holds a lock on it until then: what a killed one has left is known by that, and swept away.

Beside it lies a sheet for each sender: the number of the push, how many deliveries are there, and
their checksums. The receiver follows each sender with a checksum of its own, a moment behind it;
large deliveries are cut for that, so that it finds them in the cache that the cores share.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_r1.landing.checksum import copy_with_checksum
from megatron_r1.landing.rendezvous import Plan
from megatron_r1.landing.table import Delivery, by_rows, place
from megatron_r1.landing.transports.base import Receiver, Sender

FOLDER = Path("/dev/shm")
PREFIX = "megatron_r1_"
SWEEP_AGE_SECONDS = 60.0
POLL_SECONDS = 0.002
FOLLOW_SECONDS = 0.0002
"""Between looks at the sheets, and while a push is under way."""
PUSH, COUNT, SUMS = 0, 1, 2
"""Fields of a sheet of uint64: push, deliveries made, one checksum each."""


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
        return _map(path, num_bytes)

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
        """Check each delivery as its sender's count passes it."""
        push, done = dict.fromkeys(sheets, 0), dict.fromkeys(sheets, 0)
        num_deliveries = {sender: len(found) for sender, found in self.inbox.deliveries.items()}
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
                    under_way = any(0 < done[sender] < num_deliveries[sender] for sender in sheets)
                    time.sleep(FOLLOW_SECONDS if under_way else POLL_SECONDS)
        except Exception as error:
            self.inbox.failed(error)


class SharedMemorySender(Sender):
    part_bytes = 8 << 20
    _sheet: np.ndarray | None = None
    _file: NamedMemory | None = None

    def plan(self, deliveries: Sequence[Delivery]) -> Plan:
        self._cut = [
            (index, rows)
            for index, delivery in enumerate(deliveries)
            for rows in by_rows(delivery.height, self._row_bytes(delivery), self.part_bytes)
        ]
        """What each delivery of the plan is of those that were given: index and rows."""
        parts = [deliveries[index].part(rows) for index, rows in self._cut]
        name = _name(self.meeting.engine, self.rank)
        self.address = str(FOLDER / f"{name}_from_{self.sender}")
        self._file = NamedMemory(Path(self.address), 8 * (SUMS + len(parts)))
        self._sheet = np.memmap(self.address, np.uint64, "r+")
        self._memory = self.open()
        return super().plan(parts)

    def _row_bytes(self, delivery: Delivery) -> int:
        return delivery.num_bytes(self.table) // delivery.height

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
            given, rows = self._cut[index]
            sheet[SUMS + index] = copy_with_checksum(target, sources[given][rows])
            sheet[COUNT] = index + 1

    def close(self) -> None:
        self._sheet = None
        if self._file is not None:
            self._file.close()


class NamedMemory:
    """A file in /dev/shm with room for `num_bytes`, locked until it is closed, which also takes its
    name away, where the other side has not done so. Raises OSError where there is no room."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._is_open = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Not only sized: a write through a map into a full filesystem is a bus error.
            os.posix_fallocate(self._descriptor, 0, num_bytes)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Harmless if done."""
        if self._is_open:
            self._is_open = False
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)


def sweep() -> None:
    """Take away what processes that were killed have left in /dev/shm."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            # A new one may not be locked yet.
            if time.time() - os.fstat(file.fileno()).st_mtime > SWEEP_AGE_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _name(engine: str, rank: int) -> str:
    return f"{PREFIX}{engine.replace('/', '-')}_{rank}"


def _map(path: Path, num_bytes: int) -> torch.Tensor:
    """Raises OSError where the other side has given up, and its file is gone."""
    path.stat()  # torch would make one
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
