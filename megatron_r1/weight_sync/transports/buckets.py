"""What travels together: deliveries cut into chunks of rows, chunks packed into buckets of bytes.

Both sides cut alike, so that nothing has to be said about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_r1.weight_sync.receive.table import Delivery, Table, dtype_of, place

BUCKET_BYTES = 32 << 20
Chunk = tuple[int, int, int]
"""(index of the delivery, first row, end row)."""


def buckets(
    table: Table, deliveries: Sequence[Delivery], indices: Sequence[int]
) -> Iterator[list[Chunk]]:
    """Those of the deliveries `indices`, in order. A row is never cut."""
    bucket: list[Chunk] = []
    room = BUCKET_BYTES
    for index in indices:
        delivery = deliveries[index]
        slot = table.slots[delivery.slot]
        height = delivery.height
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


def num_bytes(table: Table, deliveries: Sequence[Delivery], bucket: Sequence[Chunk]) -> int:
    return sum(
        (bottom - top)
        * (deliveries[index].right - deliveries[index].left)
        * dtype_of(table.slots[deliveries[index].slot]).itemsize
        for index, top, bottom in bucket
    )


def pack(
    table: Table, deliveries: Sequence[Delivery], area: torch.Tensor, bucket: Sequence[Chunk]
) -> torch.Tensor:
    """The bytes of a bucket as they lie in a landing area; a copy."""
    chunks = _chunks(table, deliveries, area, bucket)
    return torch.cat([chunk.contiguous().view(-1).view(torch.uint8) for chunk in chunks])


def unpack(
    table: Table,
    deliveries: Sequence[Delivery],
    area: torch.Tensor,
    bucket: Sequence[Chunk],
    packed: torch.Tensor,
) -> None:
    """Lay them there."""
    end = 0
    for target in _chunks(table, deliveries, area, bucket):
        start, end = end, end + target.numel() * target.element_size()
        # Cloned: a view in another dtype has to begin at a multiple of its size.
        target.copy_(packed[start:end].clone().view(target.dtype).view(target.shape))


def _chunks(
    table: Table, deliveries: Sequence[Delivery], area: torch.Tensor, bucket: Sequence[Chunk]
) -> Iterator[torch.Tensor]:
    for index, top, bottom in bucket:
        yield place(area, table.slots[deliveries[index].slot], deliveries[index])[top:bottom]
