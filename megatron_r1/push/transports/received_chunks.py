"""Which chunks of a push an engine rank has received, and whether they are correct."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from megatron_r1.push.checksum import RunningChecksum
from megatron_r1.push.control_messages import IncompletePush
from megatron_r1.push.slots import SlotTable, TensorChunk, slot_view


class ReceivedChunks:
    """Which chunks of the current push are in the memory of one engine rank.

    Pushes are numbered from 1. A transport writes into `memory` and reports each chunk to
    `chunk_received`, from any thread; the engine waits in `wait`.

    Args:
        table: the slots of this rank.
        memory: uint8, all receive buffers.
        chunks: the chunks of each trainer rank or `RelaySource`, in its order, the same in every
            push.
        uses_weighted_sum: whether checksums are weighted sums (`RunningChecksum`).

    Raises:
        ValueError: where the chunks do not cover the table
    """

    def __init__(
        self,
        table: SlotTable,
        memory: torch.Tensor,
        chunks: Mapping[Any, Sequence[TensorChunk]],
        uses_weighted_sum: bool = False,
    ):
        self._uses_weighted_sum = uses_weighted_sum
        check_coverage(table, chain.from_iterable(chunks.values()))
        self.table, self.memory, self.chunks = table, memory, chunks
        self._arriving: dict[int, tuple[int, int, RunningChecksum]] = {}
        """Push, index and checksum so far of the current chunk of each source."""
        self._push_numbers = dict.fromkeys(chunks, 0)
        self._num_arrived = dict.fromkeys(chunks, 0)
        """The push of each source's last chunk, and how many of its chunks of that push have
        arrived."""
        self.checksums: dict[tuple[Any, int], int] = {}
        """The source's checksum of the chunk that arrived last, by source and index."""
        self._loaded_checksums: dict[tuple[Any, int], int] = {}
        """The checksums of the push that was taken for loading last, by source and index."""
        self._damaged: dict[int, dict[str, None]] = {}
        """The damaged tensors of each push, as an ordered set."""
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    def rows_received(self, source: Any, push_number: int, index: int, row: int) -> None:
        """Report that the first rows of a chunk are in the memory.

        Args:
            source: a key of `chunks`.
            push_number: which push of the run, from 1.
            index: which of the source's chunks, from 0.
            row: the number of rows, counted from the chunk's first."""
        self._running_checksum(source, push_number, index).update_to(row)

    def chunk_received(self, source: Any, push_number: int, index: int, sent: int) -> None:
        """Report that a chunk is in the memory.

        Args:
            source: the trainer rank or `RelaySource` that has sent it.
            push_number: which push of the run, from 1.
            index: which of the source's chunks, from 0.
            sent: the source's checksum."""
        slot = self.chunks[source][index].slot
        is_correct = self._running_checksum(source, push_number, index).digest() == sent
        with self._changed:
            if not is_correct:
                name = f"{self.table.slots[slot].name} (from rank {source})"
                self._damaged.setdefault(push_number, {})[name] = None
            self.checksums[source, index] = sent
            self._push_numbers[source], self._num_arrived[source] = push_number, index + 1
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Report that nothing more will arrive."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @property
    def has_failed(self) -> bool:
        """Whether a push failed; no later one is accepted."""
        return self._failure is not None

    def wait(
        self, push_number: int, timeout_seconds: float, sources: Sequence[Any] | None = None
    ) -> None:
        """Wait until all of a push has arrived.

        Args:
            push_number: which push of the run, from 1.
            timeout_seconds: the time limit.
            sources: the sources whose chunks are waited for, default all.

        Raises:
            IncompletePush: the push broke off, or chunks are late; it names their trainer
                ranks.
            ValueError: checksums differ; it names the tensors.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while late_ranks := self._late_sources(push_number, sources):
                seconds_left = deadline - time.monotonic()
                if self._failure is not None:
                    raise IncompletePush(f"push {push_number} broke off: {self._failure}")
                if seconds_left <= 0 or not self._changed.wait(seconds_left):
                    raise IncompletePush(
                        f"push {push_number}: after {timeout_seconds:g} s trainer ranks "
                        f"{', '.join(map(str, late_ranks))} have not sent all of it"
                    )
            damaged_names = list(self._damaged.get(push_number, ()))
        if damaged_names:
            raise ValueError(
                f"push {push_number}: {len(damaged_names)} tensors arrived otherwise than they "
                f"were sent: {_first_few(damaged_names)}"
            )

    def pop_changed_slots(self) -> set[int]:
        """Return the slots whose values changed since the last loaded push; refused pushes do not
        count."""
        with self._changed:
            changed_slots = {
                self.chunks[source][index].slot
                for (source, index), checksum in self.checksums.items()
                if self._loaded_checksums.get((source, index), checksum) != checksum
            }
            self._loaded_checksums = dict(self.checksums)
        return changed_slots

    def _running_checksum(self, source: Any, push_number: int, index: int) -> RunningChecksum:
        arriving_chunk = self._arriving.get(source)
        if arriving_chunk is None or arriving_chunk[:2] != (push_number, index):
            chunk = self.chunks[source][index]
            buffer = self.table.buffer(self.memory, push_number)
            values = slot_view(buffer, self.table.slots[chunk.slot], chunk)
            arriving_chunk = (push_number, index, RunningChecksum(values, self._uses_weighted_sum))
            self._arriving[source] = arriving_chunk
        return arriving_chunk[2]

    def _late_sources(self, push_number: int, sources: Sequence[Any] | None) -> list[Any]:
        """Return the senders whose chunks have not arrived yet."""
        return [
            source
            for source, chunks in self.chunks.items()
            if (sources is None or source in sources)
            and (self._push_numbers[source], self._num_arrived[source]) < (push_number, len(chunks))
        ]


def check_coverage(table: SlotTable, chunks: Iterable[TensorChunk]) -> None:
    """Raise ValueError, naming tensors, where the chunks leave out elements of a slot or hold
    some twice."""
    parts = defaultdict(list)
    for chunk in chunks:
        parts[chunk.slot].append(chunk)
    problems = []
    for index, slot in enumerate(table.slots):
        slot_parts = parts.get(index, [])
        size = sum(part.num_elements for part in slot_parts)
        if size != slot.height * slot.width or _chunks_overlap(slot_parts):
            problems.append(f"{slot.name} ({size} of {slot.height * slot.width} elements)")
    if problems:
        raise ValueError(
            f"{len(problems)} tensors would not be sent whole and once: {_first_few(problems)}"
        )


def _first_few(tensors: Sequence[str], count: int = 5) -> str:
    return ", ".join(tensors[:count]) + (", ..." if len(tensors) > count else "")


def _chunks_overlap(parts: list[TensorChunk]) -> bool:
    return any(
        max(a.top, b.top) < min(a.bottom, b.bottom) and max(a.left, b.left) < min(a.right, b.right)
        for i, a in enumerate(parts)
        for b in parts[:i]
    )
