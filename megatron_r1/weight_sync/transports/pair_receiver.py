"""The receiving end of a transport between hosts (`groups`): a thread per trainer rank unpacks its
buckets into the receive buffer. `exchange` completes it, where engines pass on what has entered."""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.rendezvous.failure import SetFailed
from megatron_r1.weight_sync.table import SlotTable
from megatron_r1.weight_sync.transports.base import Receiver
from megatron_r1.weight_sync.transports.buckets import BucketPacker, Chunk
from megatron_r1.weight_sync.transports.groups import (
    TRAINER_RANK,
    Groups,
    pair_groups,
    wait_for,
)

CLOSE_SECONDS = 2.0
"""How long `close` waits for the threads that receive, all together."""
IDLE_SECONDS = 30 * 24 * 3600.0
"""The time that a receiver waits for the next push to begin."""


class PairReceiver(Receiver):
    """The receiving end with a thread per trainer rank, which receives that rank's pushes."""

    backend = "gloo"
    device = torch.device("cpu")

    def prepare(self) -> None:
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self._groups: list[Groups] = []

    def allocate(self) -> torch.Tensor:
        size = self.table.areas * self.table.num_bytes
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        if table != self.table or any(thread.is_alive() for thread in self._threads):
            return None
        return self.memory

    def connect(self) -> None:
        self._start_thread(self._connect_pairs, name="connecting")

    def _connect_pairs(self) -> None:
        """Connect the pairs one after another; a trainer rank connects all of its own at once, so
        no two ranks can wait for each other's next pair."""
        for sender in self.senders:
            try:
                groups = pair_groups(self, sender, self.rank, is_sender=False)
            except Exception as error:  # noqa: BLE001 - raised by the push that waits
                self._pair_failed(sender, error)
                continue
            self._groups.append(groups)
            self._start_thread(self._receive_pushes, sender, groups, name=f"from rank {sender}")

    def _start_thread(self, function: Callable[..., None], *arguments: object, name: str) -> None:
        thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        self._is_closing = True
        for groups in self._groups:
            groups.abort()
        # A thread that is still in a call when the interpreter ends would abort the process.
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def claim_memory(self) -> None:
        """Allocate the memory if it is borrowed; called before a push is written."""

    def push_begins(self, sender: int, push: int) -> None:
        """Do nothing; a subclass learns by this call that a push begins to arrive."""

    def fail(self, error: Exception) -> None:
        """Report to the set and to this engine that nothing more will arrive."""
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            error = SetFailed(self.rendezvous.report_own(self.rank, str(error)))
        self.buffer.fail(error)

    def _receive_pushes(self, sender: int, groups: Groups) -> None:
        """Receive push after push of one trainer rank, until one fails or this end closes."""
        try:
            while not self._is_closing:
                number = torch.empty(1, dtype=torch.int64)
                idle_limit = datetime.timedelta(seconds=IDLE_SECONDS)
                groups.control.recv([number], TRAINER_RANK, 0).wait(idle_limit)
                self.claim_memory()
                self.push_begins(sender, int(number))
                self._receive_push(groups, sender, int(number))
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            self._pair_failed(sender, error)
            # The connection closes with the last reference, so that the sender fails at once.
            if groups in self._groups:
                self._groups.remove(groups)
            del groups

    def _pair_failed(self, sender: int, error: Exception) -> None:
        if not self._is_closing:
            self.fail(RuntimeError(f"trainer rank {sender}: {error}"))

    def _receive_push(self, groups: Groups, sender: int, push: int) -> None:
        """Receive a push, one bucket while the one before is unpacked, and check it."""
        deliveries = self.buffer.deliveries[sender]
        packer, area = BucketPacker(self.table, deliveries), self.table.area(self.memory, push)
        arriving: tuple[dist.Work, torch.Tensor, list[Chunk]] | None = None

        def unpack(work: dist.Work, data: torch.Tensor, bucket: list[Chunk]) -> None:
            wait_for(work, self.rendezvous, on_gpu=data.is_cuda)
            packer.unpack(area, bucket, data.to(self.device))

        for bucket in packer.cut():
            data = torch.empty(packer.num_bytes(bucket), dtype=torch.uint8, device=groups.device)
            work = groups.data.recv([data], TRAINER_RANK, 0)
            if arriving:
                unpack(*arriving)
            arriving = (work, data, bucket)
        if arriving:
            unpack(*arriving)
        sums = torch.empty(len(deliveries), dtype=torch.int64)
        wait_for(groups.control.recv([sums], TRAINER_RANK, 0), self.rendezvous)
        for index, sent in enumerate(sums.tolist()):
            self.buffer.delivery_arrived(sender, push, index, sent % 2**64)
