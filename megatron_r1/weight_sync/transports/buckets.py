"""Deliveries cut into chunks of rows, and chunks packed into buckets of bytes.

Sender and receiver cut alike, so no sizes need to be exchanged."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_r1.weight_sync.table import Delivery, SlotTable, slot_view

BUCKET_BYTES = 32 << 20
Chunk = tuple[int, int, int]
"""(index of the delivery, first row, end row)."""


@dataclass(frozen=True)
class BucketPacker:
    """Cuts deliveries to one engine rank into buckets, and packs and unpacks these."""

    table: SlotTable
    deliveries: Sequence[Delivery]

    def cut(self, num_bytes: int | None = None) -> Iterator[list[Chunk]]:
        """Yield the buckets of the deliveries, in order, each of at most `num_bytes` (default
        `BUCKET_BYTES`), or of one row: a row is never cut."""
        bucket: list[Chunk] = []
        size = room = num_bytes or BUCKET_BYTES
        for index, delivery in enumerate(self.deliveries):
            height, row_bytes = delivery.height, self._row_bytes(index)
            start = 0
            while start < height:
                rows = min(height - start, max(room // row_bytes, 0 if bucket else 1))
                if rows:
                    bucket.append((index, start, start + rows))
                    start, room = start + rows, room - rows * row_bytes
                if start < height:
                    yield bucket
                    bucket, room = [], size
        if bucket:
            yield bucket

    def num_bytes(self, bucket: Sequence[Chunk]) -> int:
        return sum((bottom - top) * self._row_bytes(index) for index, top, bottom in bucket)

    def pack(self, area: torch.Tensor, bucket: Sequence[Chunk]) -> torch.Tensor:
        """Return a copy of a bucket's bytes in a memory area, uint8."""
        chunks = self._chunks(area, bucket)
        return torch.cat([chunk.contiguous().view(-1).view(torch.uint8) for chunk in chunks])

    def unpack(self, area: torch.Tensor, bucket: Sequence[Chunk], packed: torch.Tensor) -> None:
        """Write a bucket's bytes to their places in a memory area."""
        end = 0
        for target in self._chunks(area, bucket):
            start, end = end, end + target.numel() * target.element_size()
            # Cloned: a view in another dtype must begin at a multiple of its size.
            target.copy_(packed[start:end].clone().view(target.dtype).view(target.shape))

    def _chunks(self, area: torch.Tensor, bucket: Sequence[Chunk]) -> Iterator[torch.Tensor]:
        for index, top, bottom in bucket:
            delivery = self.deliveries[index]
            yield slot_view(area, self.table.slots[delivery.slot], delivery)[top:bottom]

    def _row_bytes(self, index: int) -> int:
        return self.deliveries[index].row_bytes(self.table)
