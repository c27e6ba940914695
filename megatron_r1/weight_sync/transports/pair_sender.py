"""The sending end of a transport between hosts (`groups`)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.table import Delivery, dtype_of
from megatron_r1.weight_sync.transports import delta
from megatron_r1.weight_sync.transports.base import Sender, Slices
from megatron_r1.weight_sync.transports.buckets import BucketPacker, Chunk
from megatron_r1.weight_sync.transports.groups import (
    ENGINE_RANK,
    WindowHeader,
    integers,
    pair_groups,
    wait_for,
)
from megatron_r1.weight_sync.verify.checksum import RowsChecksum, RowsWeightedSum


class GlooSender(Sender):
    """Packs a bucket while the one before is on the wire."""

    backend = "gloo"
    device = torch.device("cpu")
    is_weighted = False

    _base = 0
    """The push whose bytes `_sent` holds, by bucket; 0: none that the receiver has whole."""
    _since_full = 0
    num_bytes_sent = 0
    """Bytes of the last window, as it was sent."""

    def plan(self, deliveries: Sequence[Delivery]) -> None:
        self._sent: list[torch.Tensor] = []
        if self.full_every > 1 and self.table.num_windows > 1:
            raise ValueError(
                f"push.delta: an engine rank receives weights in {self.table.num_windows} windows, "
                "and each overwrites the base of the next push's difference; raise "
                "push.memory_gib until all fit, or set push.delta: false"
            )
        super().plan(deliveries)

    def connect(self) -> None:
        self._groups = pair_groups(self, self.sender, self.rank, is_sender=True)

    def send(self, push: int, window: int, slices: Slices) -> None:
        self.await_free_memory(push, window)
        (control, data, device), indices = self._groups, self.windows[window]
        if not indices:
            return
        is_full = self._base == 0 or self._since_full + 1 >= self.full_every
        header = WindowHeader(push, window, 0 if is_full else self._base)
        self._base = 0  # a push that breaks off cannot be the base of another
        wait_for(control.send([integers(header)], ENGINE_RANK, 0), self.rendezvous)
        running = {index: self._checksum(index) for index in indices}
        on_the_wire: list[tuple[dist.Work, torch.Tensor]] = []
        self.num_bytes_sent = 0
        for number, bucket in enumerate(BucketPacker(self.table, self.deliveries).cut(indices)):
            packed = self._pack(bucket, slices, running)
            message = self._message(number, packed, header).to(device)
            for work, sent in on_the_wire:
                wait_for(work, self.rendezvous, on_gpu=sent.is_cuda)
            on_the_wire = []
            if header.base:
                length = integers([len(message)])
                on_the_wire.append((control.send([length], ENGINE_RANK, 0), length))
            on_the_wire.append((data.send([message], ENGINE_RANK, 0), message))
            self.num_bytes_sent += sum(sent.nbytes for _, sent in on_the_wire)
        for work, sent in on_the_wire:
            wait_for(work, self.rendezvous, on_gpu=sent.is_cuda)
        sums = integers(running[index].digest() for index in indices)
        wait_for(control.send([sums], ENGINE_RANK, 0), self.rendezvous)
        if self.full_every > 1:
            self._base, self._since_full = push, 0 if is_full else self._since_full + 1

    def close(self) -> None:
        self._sent = []
        if hasattr(self, "_groups"):
            self._groups.abort()
            del self._groups  # closes the connection

    def _checksum(self, index: int) -> RowsChecksum | RowsWeightedSum:
        if self.is_weighted:
            return RowsWeightedSum()
        return RowsChecksum(self.deliveries[index].row_bytes(self.table))

    def _pack(
        self,
        bucket: list[Chunk],
        slices: Slices,
        running: dict[int, RowsChecksum | RowsWeightedSum],
    ) -> torch.Tensor:
        """Return a bucket's bytes on the device, in the engine's dtypes, and update checksums."""
        packed = []
        for index, top, bottom in bucket:
            dtype = dtype_of(self.table.slots[self.deliveries[index].slot])
            values = slices[index][top:bottom].to(self.device, dtype).contiguous()
            running[index].update(values)
            packed.append(values.reshape(-1).view(torch.uint8))
        return torch.cat(packed)

    def _message(self, number: int, packed: torch.Tensor, header: WindowHeader) -> torch.Tensor:
        """Return the message of bucket `number`; with deltas, keep it on the host for the next
        push."""
        if self.full_every == 1:
            return packed
        message, on_host = packed, packed.cpu()
        if header.base:
            message = delta.encode(on_host, self._sent[number]).to(self.device)
        self._sent[number : number + 1] = [on_host]
        return message


class NcclSender(GlooSender):
    """A `GlooSender` between GPUs, packed in device memory.

    Run on null GPUs only (tests/nullgpu)."""

    backend, is_weighted = "nccl", True

    def connect(self) -> None:
        # Of this thread: `run_all` has set it. A thread of NCCL's would take GPU 0.
        self.device = torch.device("cuda", torch.cuda.current_device())
        super().connect()
