"""The receiving end over gloo: an engine rank of a set, which receives its share of a push and
passes that share on to the other engines.

The rank receives its share from a few trainer ranks, as in `pair_receiver`, checks it, and
exchanges it with the ranks at its position of the other engines. In every round each rank
contributes a bucket, and every rank ends with all of them: around a ring over gloo, by an
all-gather over NCCL (`_gather_buckets`). The checksums that a rank passes on are the trainer's own.

Every group is created in a thread of its own. Within one group all ranks make the same calls in the
same order, which follows from the plan, and what enters never waits for the exchange. So ranks
cannot wait for each other in a circle. In a set of one engine nothing is exchanged."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_r1.weight_sync.receive.errors import IncompletePush
from megatron_r1.weight_sync.rendezvous.engine import Peer
from megatron_r1.weight_sync.rendezvous.failure import SetFailed
from megatron_r1.weight_sync.table import Delivery
from megatron_r1.weight_sync.transports import PASSED_BYTES
from megatron_r1.weight_sync.transports.buckets import BucketPacker, Chunk
from megatron_r1.weight_sync.transports.groups import (
    Groups,
    create_groups,
    integers,
    wait_for,
)
from megatron_r1.weight_sync.transports.pair_receiver import IDLE_SECONDS, PairReceiver

PATIENCE_SECONDS = 2.0
"""How much longer than a push's limit a rank waits for other ranks, so that the rank at fault
reports first."""


class GlooReceiver(PairReceiver):
    """An engine rank's end in a set: a `PairReceiver` that exchanges what it receives."""

    def connect(self) -> None:
        """Begin to receive, and to exchange if the set has several engines."""
        self._shared: Groups | None = None
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
        self._begun: SimpleQueue[int | None] = SimpleQueue()
        """Numbers of pushes that have begun to enter this rank; None: no more will."""
        super().connect()
        if self.rendezvous.num_members > 1:
            self._start_thread(self._run_exchange, name="exchange")

    def close(self) -> None:
        self._is_closing = True
        if hasattr(self, "_begun"):
            self._begun.put(None)
        super().close()

    def fail(self, error: Exception) -> None:
        super().fail(error)
        self._begun.put(None)

    def push_begins(self, sender: int, push: int) -> None:
        """Let the exchange of a push begin, once: with the first of the senders."""
        if sender == self.senders[0]:
            self._begun.put(push)

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
                failure = SetFailed(
                    rendezvous.find_cause(self.rank, text, lambda: self._is_closing)
                )
        self.buffer.fail(failure)

    def _exchange_pushes(self) -> Exception:
        """Exchange push after push until one fails; return the error."""
        try:
            member, members = self.rendezvous.member, self.rendezvous.num_members
            shared = create_groups(self, f"exchange/{self.rank}", member, members)
            self._shared = shared
            self._groups.append(shared)
            while True:
                self.rendezvous.publish_complete(self._exchange_push(shared))
        except (ValueError, RuntimeError, OSError) as error:
            return error.with_traceback(None)  # the traceback's frames hold the group
        finally:
            # Without a reference the group's connections are closed, and the calls of the other
            # ranks fail. That has to come before this rank asks which rank has died, because a
            # rank answers only once its call has failed.
            if self._shared is not None:
                self._groups.remove(self._shared)
                self._shared = None

    def _exchange_push(self, shared: Groups) -> int:
        """Wait for the next push, exchange it, and return its number."""
        # An engine that receives nothing from the trainer does not see a push begin, so the first
        # engine that does tells all others.
        leader = next(member for member, share in enumerate(self._shares) if share)
        group = shared.control
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
        self.claim_memory()
        self._exchange_buckets(shared.data, number)
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
            gathered = torch.empty(len(sizes) * max(sizes), dtype=torch.uint8, device=self.device)
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
        gathered = torch.empty(len(counts) * len(sums), dtype=torch.int64)
        self._wait_for(group._allgather_base(gathered, sums, self._options))
        for member, of_member in enumerate(gathered.view(len(counts), -1).tolist()):
            if member != self.rendezvous.member:
                for index, checksum in enumerate(of_member[: counts[member]]):
                    self.buffer.delivery_arrived(Peer(member), push, index, checksum % 2**64)

    @property
    def _options(self) -> AllgatherOptions:
        options = AllgatherOptions()
        seconds = self.rendezvous.push_seconds + PATIENCE_SECONDS
        options.timeout = datetime.timedelta(seconds=seconds)
        return options

    def _wait_for(self, work: dist.Work) -> None:
        wait_for(work, self.rendezvous, PATIENCE_SECONDS)


def _unpack_each(
    area: torch.Tensor, arrived: list[tuple[BucketPacker, list[Chunk], torch.Tensor]]
) -> Iterator[None]:
    """Unpack buckets into the receive buffer, one per step."""
    for packer, bucket, packed in arrived:
        packer.unpack(area, bucket, packed)
        yield
