"""The sending ends of the transports between hosts (`groups`).

With `full_every` > 1 a push is the difference to the one before it, encoded bucket by bucket
(`delta`). Both ends have that one: the receiver in its memory, the sender as a copy of every packed
bucket in host memory. A push is sent whole if it is the first, if the one before it broke off (the
receiver may not have all of that one), and as every `full_every`-th."""

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
    """The sending end over gloo: packs a bucket while the one before is on the wire."""

    backend = "gloo"
    device = torch.device("cpu")
    is_weighted = False

    _base = 0
    """The push to which the next one may be sent as a difference: the receiver has all of it, and
    `_sent` has its bytes by bucket. 0: there is none, and the next push is sent whole."""
    _since_full = 0
    """Pushes sent as differences since the last whole one."""
    num_bytes_sent = 0
    """Bytes of the last window, as they were sent."""

    def plan(self, deliveries: Sequence[Delivery]) -> None:
        """Prepare for the deliveries of every push. Raises ValueError where pushes are differences
        and the engine rank receives them in several windows."""
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
        """Send a window: its header, then its buckets, each after its length where the push is a
        difference, then a checksum for every delivery."""
        self.await_free_memory(push, window)
        (control, data, device), indices = self._groups, self.windows[window]
        if not indices:
            return
        is_full = self._base == 0 or self._since_full + 1 >= self.full_every
        header = WindowHeader(push, window, 0 if is_full else self._base)
        self._base = 0  # until all is sent: a push that breaks off cannot be the base of another
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
            if header.base:  # the length of a difference depends on the values
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
        """Return the message that carries bucket `number`: its bytes, or their difference to the
        last push. Where the next push may be a difference to this one, keep the bytes in host
        memory."""
        if self.full_every == 1:
            return packed
        message, on_host = packed, packed.cpu()
        if header.base:
            message = delta.encode(on_host, self._sent[number]).to(self.device)
        self._sent[number : number + 1] = [on_host]  # the first push appends
        return message


class NcclSender(GlooSender):
    """A `GlooSender` between GPUs, packed in device memory.

    Run on null GPUs only (tests/nullgpu)."""

    backend, is_weighted = "nccl", True

    def connect(self) -> None:
        # The current device of this thread, which `run_all` has set: in NCCL's threads it is GPU 0.
        self.device = torch.device("cuda", torch.cuda.current_device())
        super().connect()
