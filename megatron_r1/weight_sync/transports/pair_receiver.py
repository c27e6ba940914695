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
from megatron_r1.weight_sync.transports import delta
from megatron_r1.weight_sync.transports.base import Receiver
from megatron_r1.weight_sync.transports.buckets import BucketPacker, Chunk
from megatron_r1.weight_sync.transports.groups import (
    TRAINER_RANK,
    Groups,
    WindowHeader,
    pair_groups,
    wait_for,
)

CLOSE_SECONDS = 2.0
"""How long `close` waits for the threads that receive, all together."""
IDLE_SECONDS = 30 * 24 * 3600.0
"""The time that a receiver waits for the next push to begin."""


class PairReceiver(Receiver):
    """The receiving end with a thread per trainer rank, which receives that rank's windows."""

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
        """Allocate the memory if it is borrowed; called before a window is written."""

    def window_begins(self, sender: int, header: WindowHeader) -> None:
        """Do nothing; a subclass learns by this call that a window begins to arrive."""

    def fail(self, error: Exception) -> None:
        """Report to the set and to this engine that nothing more will arrive."""
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            error = SetFailed(self.rendezvous.report_own(self.rank, str(error)))
        self.buffer.fail(error)

    def _receive_pushes(self, sender: int, groups: Groups) -> None:
        """Receive window after window of one trainer rank, until one fails or this end closes."""
        last = 0  # the push to which the next one may be a difference
        try:
            while not self._is_closing:
                fields = torch.empty(len(WindowHeader._fields), dtype=torch.int64)
                idle_limit = datetime.timedelta(seconds=IDLE_SECONDS)
                groups.control.recv([fields], TRAINER_RANK, 0).wait(idle_limit)
                header = WindowHeader(*fields.tolist())
                if header.base not in (0, last):
                    raise ValueError(
                        f"push {header.push} is the difference to push {header.base}, but this "
                        f"rank has push {last}"
                    )
                self.claim_memory()
                self.window_begins(sender, header)
                self._receive_window(groups, sender, header)
                last = header.push
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            self._pair_failed(sender, error)
            # The connection closes with the last reference, so that the sender fails at once.
            if groups in self._groups:
                self._groups.remove(groups)
            del groups

    def _pair_failed(self, sender: int, error: Exception) -> None:
        if not self._is_closing:
            self.fail(RuntimeError(f"trainer rank {sender}: {error}"))

    def _receive_window(self, groups: Groups, sender: int, header: WindowHeader) -> None:
        """Receive a window, one bucket while the one before is unpacked, and check it."""
        packer = BucketPacker(self.table, self.buffer.deliveries[sender])
        indices = self.buffer.windows[sender][header.window]
        arriving: tuple[dist.Work, torch.Tensor, list[Chunk]] | None = None
        for bucket in packer.cut(indices):
            size = packer.num_bytes(bucket)
            if header.base:
                length = torch.empty(1, dtype=torch.int64)
                wait_for(groups.control.recv([length], TRAINER_RANK, 0), self.rendezvous)
                size = int(length)
            data = torch.empty(size, dtype=torch.uint8, device=groups.device)
            work = groups.data.recv([data], TRAINER_RANK, 0)
            if arriving:
                self._unpack(header, packer, *arriving)
            arriving = (work, data, bucket)
        if arriving:
            self._unpack(header, packer, *arriving)
        sums = torch.empty(len(indices), dtype=torch.int64)
        wait_for(groups.control.recv([sums], TRAINER_RANK, 0), self.rendezvous)
        for index, sent in zip(indices, sums.tolist(), strict=True):
            self.buffer.delivery_arrived(sender, header.push, index, sent % 2**64)

    def _unpack(
        self,
        header: WindowHeader,
        packer: BucketPacker,
        work: dist.Work,
        data: torch.Tensor,
        bucket: list[Chunk],
    ) -> None:
        wait_for(work, self.rendezvous, on_gpu=data.is_cuda)
        packed = data.to(self.device)
        if header.base:
            # Where areas take turns, the base is in another area than this push.
            state = packer.pack(self.table.area(self.memory, header.base), bucket).cpu()
            delta.patch(state, packed.cpu())
            packed = state.to(self.device)
        packer.unpack(self.table.area(self.memory, header.push), bucket, packed)
