"""Both ends over gloo: a trainer rank sends its buckets to an engine rank of a set, which passes
its share of a push on to the other engines.

A trainer rank and an engine rank that it sends to are a group of two, so that a lost rank breaks
its own pairs only; the ranks at one position of a set's engines are a group, too. A push is its
number and a block of bytes, in buckets.

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
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import cast

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.rendezvous import IDLE_SECONDS, Peer, Rendezvous, SetFailed
from megatron_r1.weight_sync.results import IncompletePush
from megatron_r1.weight_sync.table import SlotTable
from megatron_r1.weight_sync.transports import PASSED_BYTES
from megatron_r1.weight_sync.transports.base import Receiver, Sender, Slices
from megatron_r1.weight_sync.transports.blocks import Block, Landing, MemoryBlock, SlicesBlock

BUCKET_BYTES = 32 << 20
"""What a trainer rank sends at a time; one bucket is on the wire while another is packed."""
ENGINE_RANK, TRAINER_RANK = 0, 1
"""The ranks of a pair in its group."""
CLOSE_SECONDS = 2.0
"""How long `close` waits for the threads that receive, all together."""
PATIENCE_SECONDS = 2.0
"""How much longer than a push's limit a rank waits for other ranks, so that the rank at fault
reports first."""


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
        count = sum(map(len, self.buffer.deliveries.values()))
        self._sums = torch.zeros(count, dtype=torch.int64)
        self._start_thread(self._connect_pairs, name="connecting")
        if self.rendezvous.num_members > 1:
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
        block = self._landing(push).block(sender)
        arriving: tuple[dist.Work, int, int, torch.Tensor] | None = None

        def unpack(work: dist.Work, start: int, end: int, data: torch.Tensor) -> None:
            wait_for(work, self.rendezvous)
            block.unpack(start, end, data)

        for start, end in _extents(block):
            data = torch.empty(end - start, dtype=torch.uint8)
            work = group.recv([data], TRAINER_RANK, 0)
            if arriving:
                unpack(*arriving)
            arriving = work, start, end, data
        if arriving:
            unpack(*arriving)
        self._check(sender, push, block)

    def _landing(self, push: int) -> Landing:
        area = self.table.area(self.memory, push)
        return Landing(self.table, self.buffer.deliveries, area, self._sums)

    def _check(self, source: int | Peer, push: int, block: MemoryBlock) -> None:
        """Compare what has come from a source with its checksums."""
        for index, sent in enumerate(block.sums.tolist()):
            self.buffer.delivery_arrived(source, push, index, sent % 2**64)

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
        own, members = self.rendezvous.member, range(self.rendezvous.num_members)
        entered = [self.senders if m == own else Peer(m) in self.buffer.deliveries for m in members]
        leader = next(member for member in members if entered[member])
        push = torch.zeros(1, dtype=torch.int64)  # 0: the leader closes
        if leader == own:
            begun = self._begun.get()
            if begun is not None:
                push[0] = begun
            elif not self._is_closing:
                raise RuntimeError("what enters this rank broke off")
            others = [member for member in members if member != leader]
            for work in [group.send([push], member, 0) for member in others]:
                self._wait_for(work)
        else:  # gloo cannot interrupt a wait for the next push; it ends when the leader closes
            group.recv([push], leader, 0).wait(datetime.timedelta(seconds=IDLE_SECONDS))
        if self._is_closing or not int(push):
            raise RuntimeError(f"engine {leader} of the set has ended")
        number, seconds = int(push), self.rendezvous.push_seconds
        if self.senders:
            self.buffer.wait(number, seconds, self.senders)
        self._exchange_blocks(group, number)
        return number

    def _exchange_blocks(self, group: dist.ProcessGroup, push: int) -> None:
        """Exchange a push in rounds, and check it. In each round every engine contributes a bucket,
        all padded to the size of the largest."""
        own, landing = self.rendezvous.member, self._landing(push)
        blocks = [
            landing.own_block() if member == own else landing.block(Peer(member))
            for member in range(self.rendezvous.num_members)
        ]
        arrived: list[tuple[MemoryBlock, int, int, torch.Tensor]] = []
        for start, end in _extents(max(blocks, key=lambda block: block.num_bytes), PASSED_BYTES):
            ends = [max(start, min(end, block.num_bytes)) for block in blocks]
            gathered = torch.empty(len(ends) * (end - start), dtype=torch.uint8)
            packed = gathered.chunk(len(ends))
            if ends[own] > start:
                blocks[own].pack(start, ends[own], packed[own][: ends[own] - start])
            self._gather_buckets(group, gathered, _unpack_each(arrived))
            arrived = [
                (block, start, ends[member], packed[member][: ends[member] - start])
                for member, block in enumerate(blocks)
                if member != own and ends[member] > start
            ]
        for _ in _unpack_each(arrived):
            pass
        for member, block in enumerate(blocks):
            if member != own:
                self._check(Peer(member), push, block)

    def _gather_buckets(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered`, which has equal room for a bucket of every engine, around a ring:
        `num_members` - 1 hops, in each of which a rank passes on the bucket that it received last.
        Meanwhile unpack the round before, a bucket in each hop.

        gloo's own all-gather takes three times as long with 64 MiB a bucket (docs/learned.md)."""
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

    def _wait_for(self, work: dist.Work) -> None:
        wait_for(work, self.rendezvous, PATIENCE_SECONDS)


def _unpack_each(arrived: list[tuple[MemoryBlock, int, int, torch.Tensor]]) -> Iterator[None]:
    """Unpack buckets into the receive buffer, one per step."""
    for block, start, end, bucket in arrived:
        block.unpack(start, end, bucket)
        yield


def _extents(block: Block, num_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the end of each bucket of a block, of `num_bytes` (default
    `BUCKET_BYTES`) but for the last."""
    size = num_bytes or BUCKET_BYTES
    for start in range(0, block.num_bytes, size):
        yield start, min(start + size, block.num_bytes)


class GlooSender(Sender):
    """The sending end over gloo: packs a bucket while the one before is on the wire."""

    def connect(self) -> None:
        self._group = pair_group(self.rendezvous, self.sender, self.rank, is_sender=True)

    def send(self, push: int, slices: Slices) -> None:
        """Send a push: its number, then its block in buckets."""
        group = self._group
        wait_for(group.send([torch.tensor([push])], ENGINE_RANK, 0), self.rendezvous)
        block = SlicesBlock(self.table, self.deliveries, slices, is_weighted=False)
        on_the_wire: tuple[dist.Work, torch.Tensor] | None = None
        for start, end in _extents(block):
            bucket = torch.empty(end - start, dtype=torch.uint8)
            block.pack(start, end, bucket)
            if on_the_wire:
                wait_for(on_the_wire[0], self.rendezvous)
            on_the_wire = group.send([bucket], ENGINE_RANK, 0), bucket
        if on_the_wire:
            wait_for(on_the_wire[0], self.rendezvous)

    def close(self) -> None:
        if hasattr(self, "_group"):
            self._group.abort()
            del self._group  # closes the connection


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
