"""The payloads of a push: the bytes of chunks, one after another, and behind them a checksum of
each. Buckets are cut at any byte, so both sides know their sizes from the plan."""

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch

from megatron_r1.push.checksum import INTEGERS, RowsChecksum, RowsWeightedSum
from megatron_r1.push.control_messages import IncompletePush
from megatron_r1.push.protocol import RelaySource
from megatron_r1.push.rendezvous import EngineSetFailedError
from megatron_r1.push.slots import SlotTable, TensorChunk, dtype_of, slot_view
from megatron_r1.push.transports.base import ChunkTensors, Receiver

SUM_BYTES = 8


class ByteRun(NamedTuple):
    """Contiguous bytes of a payload that are of one chunk.

    Attributes:
        number: the chunk, by its index in the payload.
        top: the first row that the bytes are in.
        bottom: the row after the last.
        skipped: the bytes of row `top` that come before these.
        num_bytes: the length of the run."""

    number: int
    top: int
    bottom: int
    skipped: int
    num_bytes: int


class Payload:
    """The bytes of chunks to an engine rank and of their checksums.

    Args:
        table: the engine rank's table.
        chunks: in the order of their bytes."""

    def __init__(self, table: SlotTable, chunks: Sequence[TensorChunk]):
        self.table, self.chunks = table, chunks
        self._row_bytes = [chunk.row_bytes(table) for chunk in chunks]
        sizes = [chunk.num_bytes(table) for chunk in chunks]
        self._ends = list(accumulate(sizes))
        self.weight_bytes = self._ends[-1] if sizes else 0
        self.num_bytes = self.weight_bytes + SUM_BYTES * len(sizes)

    def bucket_range(self, number: int, count: int) -> tuple[int, int]:
        """Return the first byte and the end of bucket `number` of `count`."""
        return self.num_bytes * number // count, self.num_bytes * (number + 1) // count

    def runs(self, start: int, end: int) -> Iterator[ByteRun]:
        """Yield the runs of chunks between two bytes of the payload."""
        index = bisect_right(self._ends, start)
        while index < len(self._ends) and start < min(end, self.weight_bytes):
            first = self._ends[index - 1] if index else 0
            stop, row_bytes = min(end, self._ends[index]), self._row_bytes[index]
            top, num_skipped = divmod(start - first, row_bytes)
            yield ByteRun(index, top, -(-(stop - first) // row_bytes), num_skipped, stop - start)
            start, index = stop, index + 1

    def checksums_between(self, start: int, end: int) -> slice:
        """Return which bytes of the checksums are between two bytes of the payload."""
        return slice(max(0, start - self.weight_bytes), max(0, end - self.weight_bytes))

    def pack(self, start: int, end: int, target: torch.Tensor) -> None:
        """Write bytes of the payload to a tensor.

        Args:
            start: the first byte.
            end: the byte after the last.
            target: (end - start,) uint8."""
        raise NotImplementedError

    def unpack(self, start: int, end: int, source: torch.Tensor) -> None:
        """Write a tensor to bytes of the payload.

        Args:
            start: the first byte.
            end: the byte after the last.
            source: (end - start,) uint8."""
        raise NotImplementedError


class LinkPayload(Payload):
    """What a trainer rank sends over a link, in the engine's dtypes. Its buckets are packed in
    order, since each checksum follows from all rows before.

    Args:
        table: the engine rank's table.
        chunks: the chunks of the link.
        chunk_tensors: the data of the chunks.
        uses_weighted_sum: whether checksums are weighted sums (`Receiver`)."""

    def __init__(
        self,
        table: SlotTable,
        chunks: Sequence[TensorChunk],
        chunk_tensors: ChunkTensors,
        uses_weighted_sum: bool = True,
    ):
        super().__init__(table, chunks)
        self._chunk_tensors, self._uses_weighted_sum = chunk_tensors, uses_weighted_sum
        self._running: tuple[int, int, RowsChecksum | RowsWeightedSum] | None = None
        """Number of a chunk, the rows of it that have been read, and its checksum so far."""
        self._checksums: list[torch.Tensor] = []

    def pack(self, start: int, end: int, target: torch.Tensor) -> None:
        """Write bytes of the payload to a tensor, and add them to the checksums.

        Args:
            start: the first byte.
            end: the byte after the last.
            target: (end - start,) uint8."""
        packed_parts = []
        for run in self.runs(start, end):
            dtype = dtype_of(self.table.slots[self.chunks[run.number].slot])
            rows = self._chunk_tensors[run.number][run.top : run.bottom]
            rows = rows.to(target.device, dtype).contiguous()
            self._update_checksum(run, rows)
            values = rows.reshape(-1).view(torch.uint8)
            packed_parts.append(values[run.skipped : run.skipped + run.num_bytes])
        if end > self.weight_bytes:
            checksums = torch.stack(self._checksums).view(torch.uint8)
            packed_parts.append(checksums[self.checksums_between(start, end)])
        torch.cat(packed_parts, out=target)

    def _update_checksum(self, run: ByteRun, rows: torch.Tensor) -> None:
        """Add to the checksum those of the rows that the bucket before did not have."""
        if self._running is None or self._running[0] != run.number:
            row_bytes = self._row_bytes[run.number]
            new_checksum = RowsWeightedSum() if self._uses_weighted_sum else RowsChecksum(row_bytes)
            self._running = run.number, 0, new_checksum
        _, rows_read, checksum = self._running
        if run.bottom > rows_read:  # and not within a row that was read whole
            checksum.update(rows[max(0, rows_read - run.top) :])
            self._running = run.number, run.bottom, checksum
            if run.bottom == self.chunks[run.number].height:
                self._checksums.append(checksum.value(rows.device))


class BufferPayload(Payload):
    """A payload in an engine rank's receive buffer: received from one source, or to be relayed.

    Args:
        table: the engine rank's table.
        chunks: in the order of their bytes.
        buffer: the memory of this push.
        checksums: those of these chunks, int64; one tensor where the payload is received."""

    def __init__(
        self,
        table: SlotTable,
        chunks: Sequence[TensorChunk],
        buffer: torch.Tensor,
        checksums: Sequence[torch.Tensor],
    ):
        super().__init__(table, chunks)
        self._buffer, self._checksums = buffer, checksums

    @property
    def checksums(self) -> torch.Tensor:
        """The checksums of all chunks, in their order."""
        return self._checksums[0] if len(self._checksums) == 1 else torch.cat(list(self._checksums))

    def pack(self, start: int, end: int, target: torch.Tensor) -> None:
        """Copy bytes of the payload to a tensor.

        Args:
            start: the first byte.
            end: the byte after the last.
            target: (end - start,) uint8."""
        offset = 0
        for view in self._views_between(start, end):
            _copy_rows(target[offset : offset + view.numel()].view(view.shape), view)
            offset += view.numel()

    def unpack(self, start: int, end: int, source: torch.Tensor) -> None:
        """Copy a tensor to bytes of the payload.

        Args:
            start: the first byte.
            end: the byte after the last.
            source: (end - start,) uint8."""
        offset = 0
        for view in self._views_between(start, end):
            _copy_rows(view, source[offset : offset + view.numel()].view(view.shape))
            offset += view.numel()

    def _views_between(self, start: int, end: int) -> Iterator[torch.Tensor]:
        """Yield the memory between two bytes of the payload, uint8 (rows, bytes of a row)."""
        for index, top, _, num_skipped, num_bytes in self.runs(start, end):
            chunk = self.chunks[index]
            row_bytes, pitch = self._row_bytes[index], self.table.slots[chunk.slot].pitch
            slot = slot_view(self._buffer, self.table.slots[chunk.slot], chunk)
            first = slot.storage_offset() * slot.itemsize + top * pitch
            first -= self._buffer.storage_offset()
            if num_skipped:
                remaining_bytes = min(row_bytes - num_skipped, num_bytes)
                yield self._buffer[first + num_skipped :][None, :remaining_bytes]
                top, num_bytes, first = top + 1, num_bytes - remaining_bytes, first + pitch
            rows, last_bytes = divmod(num_bytes, row_bytes)
            if rows:
                memory = self._buffer[first:]
                yield memory.as_strided((rows, row_bytes), (pitch, 1), memory.storage_offset())
            if last_bytes:
                yield self._buffer[first + rows * pitch :][None, :last_bytes]
        if end > self.weight_bytes:
            yield self.checksums.view(torch.uint8)[self.checksums_between(start, end)][None]


def _copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes (rows, bytes of a row) in words as large as their alignment allows."""
    if len(target) == 1:  # torch would refuse words of another size than its pitch allows
        target, source = target[0], source[0]
    offsets = [n for side in (target, source) for n in (side.storage_offset(), *side.stride()[:-1])]
    size = gcd(8, target.shape[-1], *offsets)
    target.view(INTEGERS[size]).copy_(source.view(INTEGERS[size]))


class ReceivePayloads:
    """The payloads that an engine rank receives during one push, in its receive buffer.

    Args:
        table: the rank's table.
        chunks: the chunks to the rank, by source.
        buffer: the memory of this push.
        checksums: a checksum of each chunk, int64, in the same order."""

    def __init__(
        self,
        table: SlotTable,
        chunks: Mapping[Any, Sequence[TensorChunk]],
        buffer: torch.Tensor,
        checksums: torch.Tensor,
    ):
        self.table, self.chunks, self.buffer = table, chunks, buffer
        sizes = [len(sent_chunks) for sent_chunks in chunks.values()]
        self._checksums = dict(zip(chunks, checksums[: sum(sizes)].split(sizes), strict=True))

    def payload(self, source: Any) -> BufferPayload:
        """Return what comes from a trainer rank, or from a `RelaySource`."""
        if source not in self.chunks:  # an engine that relays nothing
            return BufferPayload(self.table, (), self.buffer, [self.buffer[:0].view(torch.int64)])
        return BufferPayload(
            self.table, self.chunks[source], self.buffer, [self._checksums[source]]
        )

    def relay_payload(self) -> BufferPayload:
        """Return what has come from trainer ranks and is to be relayed, with the trainer's
        checksums."""
        pairs = [
            (chunk, checksums[index : index + 1])
            for source, checksums in self._checksums.items()
            if not isinstance(source, RelaySource)
            for index, chunk in enumerate(self.chunks[source])
        ]
        # In the order of slots, as in `protocol.chunks_to`.
        pairs.sort(key=lambda pair: pair[0].slot)
        chunks = [chunk for chunk, _ in pairs]
        return BufferPayload(self.table, chunks, self.buffer, [value for _, value in pairs])


class PayloadReceiver(Receiver):
    """An engine rank's end that receives payloads, from trainer ranks and from relays.

    Attributes:
        checksums: the checksums that arrive, as in `ReceivePayloads`."""

    checksums: torch.Tensor

    @property
    def num_chunks(self) -> int:
        """Chunks of one push to this rank, from all sources."""
        return sum(map(len, self.received_chunks.chunks.values()))

    @property
    def name(self) -> str:
        """The name by which other ranks ask whether this one is alive."""
        return f"{self.rendezvous.member}/{self.engine_rank}"

    def publish_closing(self, push_number_in_set: int) -> None:
        """Publish to the set that this rank closes, and end all waits for one of its pushes."""
        if self.is_running:
            with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
                self.rendezvous.publish_rank_failure(self.engine_rank, "it has closed")
                self.rendezvous.end_waits(push_number_in_set)

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        """Return the memory if the table is the same and no thread uses it."""
        return None if table != self.table or self.is_running else self.memory

    def receive_payloads(self, push_number: int) -> ReceivePayloads:
        """Return the payloads of a push in the receive buffer."""
        buffer = self.table.buffer(self.memory, push_number)
        return ReceivePayloads(self.table, self.received_chunks.chunks, buffer, self.checksums)

    def verify_checksums(self, push_number: int, sources: Sequence[int | RelaySource]) -> None:
        """Compare what has come from these sources with its checksums."""
        payloads = self.receive_payloads(push_number)
        for source in sources:
            for index, sent_checksum in enumerate(payloads.payload(source).checksums.tolist()):
                self.received_chunks.chunk_received(
                    source, push_number, index, sent_checksum % 2**64
                )

    def fail_set(
        self, error: Exception, lost: Sequence[str] | None = None, push_number_in_set: int = 0
    ) -> None:
        """Publish a failure of the set, and report to this engine that nothing more will arrive.

        Args:
            error: the cause.
            lost: the engine ranks of which one may have died, where that can be why.
            push_number_in_set: the push of the set for which the others answer."""
        text, failure = f"{type(error).__name__}: {error}", error
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            if lost is not None:
                self.rendezvous.publish_alive(self.name, push_number_in_set)
                cause = self.rendezvous.diagnose_failure(
                    lost, push_number_in_set, text, lambda: self.is_closing
                )
                failure = EngineSetFailedError(cause)
            elif not isinstance(error, EngineSetFailedError):
                is_damaged = isinstance(error, ValueError) and not isinstance(error, IncompletePush)
                first = self.rendezvous.publish_rank_failure(
                    self.engine_rank, text, is_damaged=is_damaged
                )
                failure = EngineSetFailedError(first)
        self.received_chunks.fail(failure)
