"""Deliveries cut into chunks of rows, and chunks packed into buckets of bytes.

Sender and receiver cut alike, so no sizes need to be exchanged.
"""

from collections.abc import Iterator, Sequence

import torch

from megatron_r1.weight_sync.receive.table import Delivery, SlotTable, slot_view

BUCKET_BYTES = 32 << 20
Chunk = tuple[int, int, int]
"""(index of the delivery, first row, end row)."""


def buckets(
    table: SlotTable, deliveries: Sequence[Delivery], indices: Sequence[int]
) -> Iterator[list[Chunk]]:
    """Yield the buckets of the deliveries `indices`, in order. A row is never cut."""
    bucket: list[Chunk] = []
    room = BUCKET_BYTES
    for index in indices:
        height, row = deliveries[index].height, deliveries[index].row_bytes(table)
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


def num_bytes(table: SlotTable, deliveries: Sequence[Delivery], bucket: Sequence[Chunk]) -> int:
    return sum((bottom - top) * deliveries[index].row_bytes(table) for index, top, bottom in bucket)


def pack(
    table: SlotTable, deliveries: Sequence[Delivery], area: torch.Tensor, bucket: Sequence[Chunk]
) -> torch.Tensor:
    """Return a copy of a bucket's bytes in a memory area, uint8."""
    chunks = _chunks(table, deliveries, area, bucket)
    return torch.cat([chunk.contiguous().view(-1).view(torch.uint8) for chunk in chunks])


def unpack(
    table: SlotTable,
    deliveries: Sequence[Delivery],
    area: torch.Tensor,
    bucket: Sequence[Chunk],
    packed: torch.Tensor,
) -> None:
    """Write a bucket's bytes to their places in a memory area."""
    end = 0
    for target in _chunks(table, deliveries, area, bucket):
        start, end = end, end + target.numel() * target.element_size()
        # Cloned: a view in another dtype must begin at a multiple of its size.
        target.copy_(packed[start:end].clone().view(target.dtype).view(target.shape))


def _chunks(
    table: SlotTable, deliveries: Sequence[Delivery], area: torch.Tensor, bucket: Sequence[Chunk]
) -> Iterator[torch.Tensor]:
    for index, top, bottom in bucket:
        yield slot_view(area, table.slots[deliveries[index].slot], deliveries[index])[top:bottom]
