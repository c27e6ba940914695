"""The sending ends of the transports between hosts (`groups`)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.checksum import RowsChecksum, RowsWeightedSum
from megatron_r1.weight_sync.table import Delivery, dtype_of
from megatron_r1.weight_sync.transports.base import Sender, Slices
from megatron_r1.weight_sync.transports.buckets import BucketPacker, Chunk
from megatron_r1.weight_sync.transports.groups import (
    ENGINE_RANK,
    integers,
    pair_groups,
    wait_for,
)


class GlooSender(Sender):
    """The sending end over gloo: packs a bucket while the one before is on the wire."""

    backend = "gloo"
    device = torch.device("cpu")
    is_weighted = False

    def connect(self) -> None:
        self._groups = pair_groups(self, self.sender, self.rank, is_sender=True)

    def send(self, push: int, slices: Slices) -> None:
        """Send a push: its number, then its buckets, then a checksum for every delivery."""
        control, data, device = self._groups
        wait_for(control.send([integers([push])], ENGINE_RANK, 0), self.rendezvous)
        running = [self._checksum(delivery) for delivery in self.deliveries]
        on_the_wire: tuple[dist.Work, torch.Tensor] | None = None
        for bucket in BucketPacker(self.table, self.deliveries).cut():
            message = self._pack(bucket, slices, running).to(device)
            if on_the_wire:
                work, sent = on_the_wire
                wait_for(work, self.rendezvous, on_gpu=sent.is_cuda)
            on_the_wire = data.send([message], ENGINE_RANK, 0), message
        if on_the_wire:
            work, sent = on_the_wire
            wait_for(work, self.rendezvous, on_gpu=sent.is_cuda)
        sums = integers(of_delivery.digest() for of_delivery in running)
        wait_for(control.send([sums], ENGINE_RANK, 0), self.rendezvous)

    def close(self) -> None:
        if hasattr(self, "_groups"):
            self._groups.abort()
            del self._groups  # closes the connection

    def _checksum(self, delivery: Delivery) -> RowsChecksum | RowsWeightedSum:
        if self.is_weighted:
            return RowsWeightedSum()
        return RowsChecksum(delivery.row_bytes(self.table))

    def _pack(
        self,
        bucket: list[Chunk],
        slices: Slices,
        running: Sequence[RowsChecksum | RowsWeightedSum],
    ) -> torch.Tensor:
        """Return a bucket's bytes on the device, in the engine's dtypes, and update checksums."""
        packed = []
        for index, top, bottom in bucket:
            dtype = dtype_of(self.table.slots[self.deliveries[index].slot])
            values = slices[index][top:bottom].to(self.device, dtype).contiguous()
            running[index].update(values)
            packed.append(values.reshape(-1).view(torch.uint8))
        return torch.cat(packed)
