"""Both ends over gloo: a trainer rank sends its buckets to an engine rank of a set, which passes
its share of a push on to the other engines.

A trainer rank and an engine rank that it sends to are a group of two, so that a lost rank breaks
its own pairs only; the ranks at one position of a set's engines are a group, too. A push is its
number, a stream of buckets, and a checksum of each delivery. Sender and receiver cut deliveries
alike into chunks of rows, and pack these into buckets, so no sizes need to be exchanged.

A thread per trainer rank unpacks its buckets into the receive buffer. What has entered is checked
and exchanged with the ranks at this position of the other engines. In every round each rank
contributes a bucket, and every rank ends with all of them, around a ring. The checksums that a rank
passes on are the trainer's own.

Every group is created in a thread of its own. Within one group all ranks make the same calls in the
same order, which follows from the plan, and what enters never waits for the exchange. So ranks
cannot wait for each other in a circle. In a set of one engine nothing is exchanged."""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from queue import SimpleQueue
from typing import cast

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.checksum import RowsChecksum
from megatron_r1.weight_sync.rendezvous import IDLE_SECONDS, Peer, Rendezvous, SetFailed
from megatron_r1.weight_sync.results import IncompletePush
from megatron_r1.weight_sync.table import Delivery, SlotTable, dtype_of, slot_view
from megatron_r1.weight_sync.transports import PASSED_BYTES
from megatron_r1.weight_sync.transports.base import Receiver, Sender, Slices

BUCKET_BYTES = 32 << 20
Chunk = tuple[int, int, int]
"""(index of the delivery, first row, end row)."""
ENGINE_RANK, TRAINER_RANK = 0, 1
"""The ranks of a pair in its group."""
CLOSE_SECONDS = 2.0
"""How long `close` waits for the threads that receive, all together."""
PATIENCE_SECONDS = 2.0
"""How much longer than a push's limit a rank waits for other ranks, so that the rank at fault
reports first."""


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


class GlooReceiver(Receiver):
    """An engine rank's end in a set: a thread per trainer rank receives that rank's pushes, and
    another exchanges them if the set has several engines."""

    def prepare(self) -> None:
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self._groups: list[dist.ProcessGroup] = []
        self._shared: dist.ProcessGroup | None = None
        self._begun: SimpleQueue[int | None] = SimpleQueue()
        """Numbers of pushes that have begun to enter this rank; None: no more will."""

    def allocate(self) -> torch.Tensor:
        size = self.table.areas * self.table.num_bytes
        return torch.empty(size, dtype=torch.uint8)

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        if table != self.table or any(thread.is_alive() for thread in self._threads):
            return None
        return self.memory

    def connect(self) -> None:
        """Begin to receive, and to exchange if the set has several engines."""
        deliveries, members = self.buffer.deliveries, range(self.rendezvous.num_members)
        # By member: what enters that engine from trainer ranks.
        shares: list[Sequence[Delivery]] = [deliveries.get(Peer(member), ()) for member in members]
        own = [
            (delivery, (sender, index))
            for sender in self.senders
            for index, delivery in enumerate(deliveries[sender])
        ]
        # In the order of slots, as `EngineRendezvous.read_plan` sorts the others' shares.
        own.sort(key=lambda entry: entry[0].slot)
        shares[self.rendezvous.member] = [delivery for delivery, _ in own]
        self._shares, self._own_sources = shares, [source for _, source in own]
        self._start_thread(self._connect_pairs, name="connecting")
        if len(members) > 1:
            self._start_thread(self._run_exchange, name="exchange")

    def close(self) -> None:
        self._is_closing = True
        self._begun.put(None)
        for group in list(self._groups):  # threads that end meanwhile remove theirs
            group.abort()
        # A thread that is still in a call when the interpreter ends would abort the process.
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start_thread(self, function: Callable[..., None], *arguments: object, name: str) -> None:
        thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _connect_pairs(self) -> None:
        """Connect the pairs one after another; a trainer rank connects all of its own at once, so
        no two ranks can wait for each other's next pair."""
        for sender in self.senders:
            try:
                group = pair_group(self.rendezvous, sender, self.rank, is_sender=False)
            except Exception as error:  # noqa: BLE001 - raised by the push that waits
                self._pair_failed(sender, error)
                continue
            self._groups.append(group)
            self._start_thread(self._receive_pushes, sender, group, name=f"from rank {sender}")
            del group  # the thread's is the last

    def _receive_pushes(self, sender: int, group: dist.ProcessGroup) -> None:
        """Receive push after push of one trainer rank, until one fails or this end closes."""
        try:
            while not self._is_closing:
                number = torch.empty(1, dtype=torch.int64)
                idle_limit = datetime.timedelta(seconds=IDLE_SECONDS)
                group.recv([number], TRAINER_RANK, 0).wait(idle_limit)
                if sender == self.senders[0]:
                    self._begun.put(int(number))
                self._receive_push(group, sender, int(number))
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            self._pair_failed(sender, error)
        finally:
            # The connection closes with the last reference, so that the sender fails at once: also
            # where `close` came before this thread's first call.
            self._groups.remove(group)
            del group

    def _pair_failed(self, sender: int, error: Exception) -> None:
        """Report to the set and to this engine that nothing more will arrive."""
        if self._is_closing:
            return
        failure: Exception = RuntimeError(f"trainer rank {sender}: {error}")
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            failure = SetFailed(self.rendezvous.report_own(self.rank, str(failure)))
        self.buffer.fail(failure)
        self._begun.put(None)

    def _receive_push(self, group: dist.ProcessGroup, sender: int, push: int) -> None:
        """Receive a push, one bucket while the one before is unpacked, and check it."""
        deliveries = self.buffer.deliveries[sender]
        packer, area = BucketPacker(self.table, deliveries), self.table.area(self.memory, push)
        arriving: tuple[dist.Work, torch.Tensor, list[Chunk]] | None = None

        def unpack(work: dist.Work, data: torch.Tensor, bucket: list[Chunk]) -> None:
            wait_for(work, self.rendezvous)
            packer.unpack(area, bucket, data)

        for bucket in packer.cut():
            data = torch.empty(packer.num_bytes(bucket), dtype=torch.uint8)
            work = group.recv([data], TRAINER_RANK, 0)
            if arriving:
                unpack(*arriving)
            arriving = (work, data, bucket)
        if arriving:
            unpack(*arriving)
        sums = torch.empty(len(deliveries), dtype=torch.int64)
        wait_for(group.recv([sums], TRAINER_RANK, 0), self.rendezvous)
        for index, sent in enumerate(sums.tolist()):
            self.buffer.delivery_arrived(sender, push, index, sent % 2**64)

    def _run_exchange(self) -> None:
        """Exchange pushes until one fails; then report the cause, which the push that waits in
        this engine raises."""
        error = self._exchange_pushes()
        if self._is_closing or self.buffer.has_failed:
            return
        rendezvous, text, failure = self.rendezvous, str(error), error
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            if isinstance(error, ValueError):  # what enters this rank is damaged or late
                is_damaged = not isinstance(error, IncompletePush)
                failure = SetFailed(rendezvous.report_own(self.rank, text, is_damaged=is_damaged))
            else:
                # A rank answers once its own call has failed; the failure ends the set.
                rendezvous.answer(f"{rendezvous.member}/{self.rank}", 0)
                position = [f"{member}/{self.rank}" for member in range(rendezvous.num_members)]
                cause = rendezvous.find_cause(position, 0, text, lambda: self._is_closing)
                failure = SetFailed(cause)
        self.buffer.fail(failure)

    def _exchange_pushes(self) -> Exception:
        """Exchange push after push until one fails; return the error."""
        try:
            member, members = self.rendezvous.member, self.rendezvous.num_members
            shared = create_group(self.rendezvous, f"exchange/{self.rank}", member, members)
            self._shared = shared
            self._groups.append(shared)
            while not self._is_closing:
                self.rendezvous.publish_complete(self._exchange_push(shared))
            return RuntimeError("it closes")
        except (ValueError, RuntimeError, OSError) as error:
            return error.with_traceback(None)  # the traceback's frames hold the group
        finally:
            # Without a reference the group's connections are closed, and the calls of the other
            # ranks fail. That has to come before this rank asks which rank has died, because a
            # rank answers only once its call has failed.
            if self._shared is not None:
                self._groups.remove(self._shared)
                self._shared = None

    def _exchange_push(self, group: dist.ProcessGroup) -> int:
        """Wait for the next push, exchange it, and return its number."""
        # An engine that receives nothing from the trainer does not see a push begin, so the first
        # engine that does tells all others.
        leader = next(member for member, share in enumerate(self._shares) if share)
        push = torch.zeros(1, dtype=torch.int64)  # 0: the leader closes
        if leader == self.rendezvous.member:
            begun = self._begun.get()
            if begun is not None:
                push[0] = begun
            elif not self._is_closing:
                raise RuntimeError("what enters this rank broke off")
            others = [m for m in range(self.rendezvous.num_members) if m != leader]
            for work in [group.send([push], member, 0) for member in others]:
                self._wait_for(work)
        else:  # gloo cannot interrupt a wait for the next push; it ends when the leader closes
            group.recv([push], leader, 0).wait(datetime.timedelta(seconds=IDLE_SECONDS))
        if self._is_closing or not int(push):
            raise RuntimeError(f"engine {leader} of the set has ended")
        number, seconds = int(push), self.rendezvous.push_seconds
        if self.senders:
            self.buffer.wait(number, seconds, self.senders)
        self._exchange_buckets(group, number)
        self._exchange_checksums(group, number)
        return number

    def _exchange_buckets(self, group: dist.ProcessGroup, push: int) -> None:
        """Exchange a push in rounds. In each round every engine contributes a bucket, all padded
        to the size of the largest."""
        area, own = self.table.area(self.memory, push), self.rendezvous.member
        packers = [BucketPacker(self.table, share) for share in self._shares]
        cuts = [packer.cut(PASSED_BYTES) for packer in packers]
        arrived: list[tuple[BucketPacker, list[Chunk], torch.Tensor]] = []
        for buckets in zip_longest(*cuts, fillvalue=[]):
            sizes = [
                packer.num_bytes(bucket) for packer, bucket in zip(packers, buckets, strict=True)
            ]
            gathered = torch.empty(len(sizes) * max(sizes), dtype=torch.uint8)
            packed = gathered.chunk(len(sizes))
            if buckets[own]:
                packed[own][: sizes[own]] = packers[own].pack(area, buckets[own])
            self._gather_buckets(group, gathered, _unpack_each(area, arrived))
            arrived = [
                (packers[member], bucket, packed[member][: sizes[member]])
                for member, bucket in enumerate(buckets)
                if member != own and bucket
            ]
        for _ in _unpack_each(area, arrived):
            pass

    def _gather_buckets(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered`, which has equal room for a bucket of every engine, around a ring:
        `num_members` - 1 hops, in each of which a rank passes on the bucket that it received last.
        Meanwhile unpack the round before, a bucket in each hop.

        gloo's own all-gather takes three times as long with 64 MiB a bucket (docs/log.md)."""
        member, num_members = self.rendezvous.member, self.rendezvous.num_members
        buckets = gathered.chunk(num_members)
        for hop in range(num_members - 1):
            sent = buckets[(member - hop) % num_members]
            received = buckets[(member - hop - 1) % num_members]
            works = [
                group.send([sent], (member + 1) % num_members, 0),
                group.recv([received], (member - 1) % num_members, 0),
            ]
            next(unpacking, None)
            for work in works:
                self._wait_for(work)

    def _exchange_checksums(self, group: dist.ProcessGroup, push: int) -> None:
        """Exchange the trainer's checksums, and compare what the other engines passed on with
        these."""
        counts = [len(share) for share in self._shares]
        sums = torch.zeros(max(counts), dtype=torch.int64)
        sums[: len(self._own_sources)] = integers(
            self.buffer.checksums[source] for source in self._own_sources
        )
        gathered = sums.repeat(len(counts))  # what is not the own part is overwritten
        self._gather_buckets(group, gathered, iter(()))
        for member, of_member in enumerate(gathered.view(len(counts), -1).tolist()):
            if member != self.rendezvous.member:
                for index, checksum in enumerate(of_member[: counts[member]]):
                    self.buffer.delivery_arrived(Peer(member), push, index, checksum % 2**64)

    def _wait_for(self, work: dist.Work) -> None:
        wait_for(work, self.rendezvous, PATIENCE_SECONDS)


def _unpack_each(
    area: torch.Tensor, arrived: list[tuple[BucketPacker, list[Chunk], torch.Tensor]]
) -> Iterator[None]:
    """Unpack buckets into the receive buffer, one per step."""
    for packer, bucket, packed in arrived:
        packer.unpack(area, bucket, packed)
        yield


class GlooSender(Sender):
    """The sending end over gloo: packs a bucket while the one before is on the wire."""

    def connect(self) -> None:
        self._group = pair_group(self.rendezvous, self.sender, self.rank, is_sender=True)

    def send(self, push: int, slices: Slices) -> None:
        """Send a push: its number, then its buckets, then a checksum for every delivery."""
        group = self._group
        wait_for(group.send([integers([push])], ENGINE_RANK, 0), self.rendezvous)
        running = [RowsChecksum(delivery.row_bytes(self.table)) for delivery in self.deliveries]
        on_the_wire: tuple[dist.Work, torch.Tensor] | None = None
        for bucket in BucketPacker(self.table, self.deliveries).cut():
            message = self._pack(bucket, slices, running)
            if on_the_wire:
                wait_for(on_the_wire[0], self.rendezvous)
            on_the_wire = group.send([message], ENGINE_RANK, 0), message
        if on_the_wire:
            wait_for(on_the_wire[0], self.rendezvous)
        sums = integers(of_delivery.digest() for of_delivery in running)
        wait_for(group.send([sums], ENGINE_RANK, 0), self.rendezvous)

    def close(self) -> None:
        if hasattr(self, "_group"):
            self._group.abort()
            del self._group  # closes the connection

    def _pack(
        self,
        bucket: list[Chunk],
        slices: Slices,
        running: Sequence[RowsChecksum],
    ) -> torch.Tensor:
        """Return a bucket's bytes in host memory, in the engine's dtypes, and update checksums."""
        packed = []
        for index, top, bottom in bucket:
            dtype = dtype_of(self.table.slots[self.deliveries[index].slot])
            values = slices[index][top:bottom].to("cpu", dtype).contiguous()
            running[index].update(values)
            packed.append(values.reshape(-1).view(torch.uint8))
        return torch.cat(packed)


def pair_group(
    rendezvous: Rendezvous, sender: int, engine_rank: int, *, is_sender: bool
) -> dist.ProcessGroup:
    """Return the group of trainer rank `sender` and a rank of the rendezvous' engine."""
    name = f"pair/{sender}/{rendezvous.member}/{engine_rank}"
    return create_group(rendezvous, name, TRAINER_RANK if is_sender else ENGINE_RANK, 2)


def create_group(rendezvous: Rendezvous, name: str, rank: int, size: int) -> dist.ProcessGroup:
    """Return the group of `size` ranks that meet under `name`."""
    store = dist.PrefixStore(name, rendezvous.new_connection())
    timeout = datetime.timedelta(seconds=rendezvous.timeout_seconds)
    # The stubs give a backend no send and recv.
    return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, timeout))


def wait_for(work: dist.Work, rendezvous: Rendezvous, more_seconds: float = 0.0) -> None:
    """Wait for `work`, at most as long as a push may take, and `more_seconds`."""
    work.wait(datetime.timedelta(seconds=rendezvous.push_seconds + more_seconds))


def integers(values: Iterable[int]) -> torch.Tensor:
    """Return integers of 64 bits, signed or not, as they are on the wire: int64."""
    return torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], dtype=torch.int64)
