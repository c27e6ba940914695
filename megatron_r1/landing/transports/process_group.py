"""Many hosts: torch.distributed point to point, over gloo (host memory) or NCCL (GPUs).

Every pair of a trainer and an engine rank that have something to exchange is a process group of
two, so that the loss of one rank is the loss of its pairs only. A push is a stream: the deliveries
are cut into chunks, chunks are packed into buckets, and of two buckets one is on the wire while the
other is packed, or unpacked; the checksums follow each window.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import xxhash

from megatron_r1.landing.checksum import as_bytes
from megatron_r1.landing.rendezvous import Plan
from megatron_r1.landing.table import Delivery, Table, dtype_of, place
from megatron_r1.landing.transports.base import Receiver, Sender, of_window

BUCKET_BYTES = 32 << 20
HEADER = 2
"""int64: push, window."""
IDLE_SECONDS = 30 * 24 * 3600.0
"""How long a receiver waits for the next push to begin."""
Chunk = tuple[int, int, int]
"""(index of the delivery, first row, end row)."""


def buckets(
    table: Table, deliveries: Sequence[Delivery], indices: Sequence[int]
) -> Iterator[list[Chunk]]:
    """What travels together, in order; the same on both sides. A row is never cut."""
    bucket: list[Chunk] = []
    room = BUCKET_BYTES
    for index in indices:
        delivery = deliveries[index]
        slot = table.slots[delivery.slot]
        height = delivery.bottom - delivery.top
        row = (delivery.right - delivery.left) * dtype_of(slot).itemsize
        start = 0
        while start < height:
            rows = min(height - start, max(room // row, 0 if bucket else 1))
            if rows:
                bucket.append((index, start, start + rows))
                start, room = start + rows, room - rows * row
            if start < height:
                yield bucket
                bucket, room = [], BUCKET_BYTES
    if bucket:
        yield bucket


class ProcessGroupReceiver(Receiver):
    backend = ""
    device = torch.device("cpu")

    def allocate(self) -> torch.Tensor:
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self._groups: list[dist.ProcessGroup] = []
        return torch.empty(self.table.areas * self.table.num_bytes, dtype=torch.uint8)

    def connect(self, plans: dict[int, Plan]) -> None:
        for sender in plans:
            thread = threading.Thread(
                target=self._receive, args=(sender,), name=f"from rank {sender}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        self._is_closing = True
        for group in self._groups:
            group.abort()

    def _receive(self, sender: int) -> None:
        try:
            group = pair(self.backend, self.meeting, sender, self.rank, is_sender=False)
            self._groups.append(group)
            while not self._is_closing:
                header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
                group.recv([header], 1, 0).wait(datetime.timedelta(seconds=IDLE_SECONDS))
                push, window = header.tolist()
                self._receive_window(group, sender, push, window)
        except Exception as error:
            if not self._is_closing:
                self.inbox.failed(RuntimeError(f"trainer rank {sender}: {error}"))

    def _receive_window(
        self, group: dist.ProcessGroup, sender: int, push: int, window: int
    ) -> None:
        deliveries = self.inbox.deliveries[sender]
        indices = of_window(self.table, deliveries, window)
        area = self.table.area(self.memory, push)
        arriving: tuple[dist.Work, torch.Tensor, list[Chunk]] | None = None
        for bucket in buckets(self.table, deliveries, indices):
            buffer = torch.empty(
                sum(_chunk_bytes(self.table, deliveries, chunk) for chunk in bucket),
                dtype=torch.uint8,
                device=self.device,
            )
            work = group.recv([buffer], 1, 0)
            if arriving:
                self._unpack(area, deliveries, *arriving)
            arriving = (work, buffer, bucket)
        if arriving:
            self._unpack(area, deliveries, *arriving)
        sums = torch.empty(len(indices), dtype=torch.int64, device=self.device)
        group.recv([sums], 1, 0).wait()
        for index, sent in zip(indices, sums.tolist(), strict=True):
            self.inbox.arrived(sender, push, index, sent % 2**64)

    def _unpack(
        self,
        area: torch.Tensor,
        deliveries: Sequence[Delivery],
        work: dist.Work,
        buffer: torch.Tensor,
        bucket: list[Chunk],
    ) -> None:
        work.wait()
        buffer, end = buffer.cpu(), 0
        for chunk in bucket:
            index, top, bottom = chunk
            slot = self.table.slots[deliveries[index].slot]
            target = place(area, slot, deliveries[index])[top:bottom]
            start, end = end, end + target.numel() * target.element_size()
            target.copy_(buffer[start:end].clone().view(target.dtype).view(target.shape))


class ProcessGroupSender(Sender):
    backend = ""
    device = torch.device("cpu")

    def connect(self) -> None:
        self._group = pair(self.backend, self.meeting, self.sender, self.rank, is_sender=True)

    def send(self, push: int, window: int, sources: Sequence[torch.Tensor]) -> None:
        self.await_room(push, window)
        group, indices = self._group, self.of_window(window)
        if not indices:
            return
        header = torch.tensor([push, window], dtype=torch.int64, device=self.device)
        group.send([header], 0, 0).wait()
        hashes = {index: xxhash.xxh3_64() for index in indices}
        on_the_wire: tuple[dist.Work, torch.Tensor] | None = None
        for bucket in buckets(self.table, self.deliveries, indices):
            packed = []
            for index, top, bottom in bucket:
                dtype = dtype_of(self.table.slots[self.deliveries[index].slot])
                values = sources[index][top:bottom].to("cpu", dtype).contiguous()
                hashes[index].update(as_bytes(values))
                packed.append(values.reshape(-1).view(torch.uint8))
            buffer = torch.cat(packed).to(self.device)
            if on_the_wire:
                on_the_wire[0].wait()
            on_the_wire = (group.send([buffer], 0, 0), buffer)
        if on_the_wire:
            on_the_wire[0].wait()
        sums = [hashes[index].intdigest() for index in indices]
        signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in sums], dtype=torch.int64)
        group.send([signed.to(self.device)], 0, 0).wait()

    def close(self) -> None:
        if hasattr(self, "_group"):
            self._group.abort()


def pair(backend: str, meeting, sender: int, rank: int, *, is_sender: bool) -> dist.ProcessGroup:
    """The group of a trainer rank (1 in it) and an engine rank (0 in it)."""
    store = dist.PrefixStore(f"pair/{sender}/{rank}", meeting.store)
    place_in = 1 if is_sender else 0
    timeout = datetime.timedelta(seconds=meeting.timeout_seconds)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, place_in, 2, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, place_in, 2, options)


def _chunk_bytes(table: Table, deliveries: Sequence[Delivery], chunk: Chunk) -> int:
    index, top, bottom = chunk
    delivery = deliveries[index]
    size = dtype_of(table.slots[delivery.slot]).itemsize
    return (bottom - top) * (delivery.right - delivery.left) * size


class GlooReceiver(ProcessGroupReceiver):
    backend = "gloo"


class GlooSender(ProcessGroupSender):
    backend = "gloo"


class NcclReceiver(ProcessGroupReceiver):
    backend, device = "nccl", torch.device("cuda")


class NcclSender(ProcessGroupSender):
    backend, device = "nccl", torch.device("cuda")
