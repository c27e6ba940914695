"""Both ends over gloo: a trainer rank sends its payload to an engine rank of a set, which relays it
to the other engines.

A trainer rank and an engine rank that it sends to are a group of two, so that a lost rank breaks
its own pairs only. A thread of the engine rank unpacks what comes over each pair: a push is its
number and a payload of bytes, in buckets.

Equal ranks of a set's engines are a group, too. Another thread checks what trainer ranks have sent
and relays it there, a bucket each way at a time. The checksums that a rank relays are the
trainer's own.

Within one group all ranks make the same calls in the same order, which follows from the plan, and
what trainer ranks send never waits for the relays. So ranks cannot deadlock."""

import datetime
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist

from megatron_r1.base.transports import RELAY_BUCKET_BYTES
from megatron_r1.push.protocol import RelaySource
from megatron_r1.push.rendezvous import IDLE_SECONDS, Rendezvous
from megatron_r1.push.transports.base import ChunkTensors, Sender
from megatron_r1.push.transports.payloads import (
    BufferPayload,
    LinkPayload,
    Payload,
    PayloadReceiver,
)

BUCKET_BYTES = 32 << 20
"""What a trainer rank sends at a time; one bucket is on the wire while another is packed."""
ENGINE_RANK, TRAINER_RANK = 0, 1
"""The ranks of a pair in its group."""
CLOSE_SECONDS = 2.0
"""How long `close` waits for the threads that receive, all together."""
RELAY_GRACE_AFTER_LIMIT_SECONDS = 2.0
"""How much longer than a push's limit a rank waits for other ranks, so that the rank at fault
reports first."""


class GlooReceiver(PayloadReceiver):
    """An engine rank's end in a set. A thread for each trainer rank receives that rank's pushes;
    another relays them if the set has several engines."""

    def prepare(self) -> None:
        """Begin without groups: `connect` makes one for each trainer rank, and one for relays."""
        self._groups: list[dist.ProcessGroup] = []
        self._push_number_in_set = 0
        """The push that this rank relays or waits for."""

    def allocate(self) -> torch.Tensor:
        """Return host memory for all buffers."""
        return torch.empty(self.num_bytes, dtype=torch.uint8)

    def connect(self) -> None:
        """Begin to receive, and to relay if the set has several engines."""
        self.checksums = torch.zeros(self.num_chunks, dtype=torch.int64)
        self.start_thread(self._connect_pairs, name="connecting")
        if self.rendezvous.num_members > 1:
            self.start_thread(self._run_relays, name="relays")

    def close(self) -> None:
        """Abort the groups, leave the push under way and join the threads."""
        self.is_closing = True
        for group in list(self._groups):  # threads that end meanwhile remove theirs
            group.abort()
        if self._push_number_in_set:
            self.publish_closing(self._push_number_in_set)
        self.join_threads(CLOSE_SECONDS)

    def _connect_pairs(self) -> None:
        """Connect the pairs one after another. A trainer rank connects all of its own at once, so
        no two ranks can wait for each other's next pair."""
        for trainer_rank in self.senders:
            try:
                group = pair_group(self.rendezvous, trainer_rank, self.engine_rank, is_sender=False)
            except Exception as error:  # noqa: BLE001 - raised by the push that waits
                self._pair_failed(trainer_rank, error)
                continue
            self._groups.append(group)
            self.start_thread(
                self._receive_pushes, trainer_rank, group, name=f"from rank {trainer_rank}"
            )
            del group  # the thread's is the last

    def _receive_pushes(self, trainer_rank: int, group: dist.ProcessGroup) -> None:
        """Receive push after push of one trainer rank, until one fails or this end closes."""
        try:
            while not self.is_closing:
                push_number = torch.empty(1, dtype=torch.int64)
                idle_limit = datetime.timedelta(seconds=IDLE_SECONDS)
                group.recv([push_number], TRAINER_RANK, 0).wait(idle_limit)
                self._receive_push(group, trainer_rank, int(push_number))
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            self._pair_failed(trainer_rank, error)
        finally:
            # The connection closes with the last reference, so that the sender fails at once: also
            # where `close` came before this thread's first call.
            self._groups.remove(group)
            del group

    def _pair_failed(self, trainer_rank: int, error: Exception) -> None:
        if not self.is_closing:
            self.fail_set(RuntimeError(f"trainer rank {trainer_rank}: {error}"))

    def _receive_push(self, group: dist.ProcessGroup, trainer_rank: int, push_number: int) -> None:
        """Receive a push, one bucket while the one before is unpacked, and check it."""
        payload = self.receive_payloads(push_number).payload(trainer_rank)
        arriving_bucket: tuple[dist.Work, int, int, torch.Tensor] | None = None

        def unpack(work: dist.Work, start: int, end: int, data: torch.Tensor) -> None:
            _wait_for(work, self.rendezvous)
            payload.unpack(start, end, data)

        for start, end in _bucket_ranges(payload):
            data = torch.empty(end - start, dtype=torch.uint8)
            work = group.recv([data], TRAINER_RANK, 0)
            if arriving_bucket:
                unpack(*arriving_bucket)
            arriving_bucket = work, start, end, data
        if arriving_bucket:
            unpack(*arriving_bucket)
        self.verify_checksums(push_number, [trainer_rank])

    def _run_relays(self) -> None:
        """Relay pushes until one fails; then report the cause, which the push that waits in
        this engine raises."""
        error = self._relay_pushes()
        if self.is_closing or self.received_chunks.has_failed:
            return
        # A ValueError is of what trainer ranks send, another error of a call with other ranks.
        names = [f"{member}/{self.engine_rank}" for member in range(self.rendezvous.num_members)]
        self.fail_set(error, None if isinstance(error, ValueError) else names)

    def _relay_pushes(self) -> Exception:
        """Relay push after push until one fails; return the error."""
        group: dist.ProcessGroup | None = None
        try:
            member, members = self.rendezvous.member, self.rendezvous.num_members
            group = _create_group(self.rendezvous, f"relays/{self.engine_rank}", member, members)
            self._groups.append(group)
            connection = self.rendezvous.new_connection()
            while True:
                self._push_number_in_set += 1  # `close` reads it after it has set `is_closing`
                if self.is_closing:
                    return RuntimeError(f"engine rank {self.name} closes")
                push_number = self.rendezvous.wait_push_begun(self._push_number_in_set, connection)
                if not push_number:
                    return RuntimeError("a rank of the set has closed")
                if self.senders:
                    self.received_chunks.wait(
                        push_number, self.rendezvous.push_timeout_seconds, self.senders
                    )
                self._relay_buckets(group, push_number)
                self.rendezvous.publish_complete(push_number)
        except (ValueError, RuntimeError, OSError) as error:
            return error.with_traceback(None)  # the traceback's frames hold the group
        finally:
            # Without a reference the group's connections are closed, and the calls of the other
            # ranks fail. That has to come before this rank asks which rank has died, because a
            # rank answers only once its call has failed.
            if group is not None:
                self._groups.remove(group)

    def _relay_buckets(self, group: dist.ProcessGroup, push_number: int) -> None:
        """Relay a push, and check it.

        In hop h this rank sends its bucket to the engine h places on, receives one from h places
        before, and unpacks the one of hop h - 1. gloo's own all-gather takes three times as long
        with 64 MiB a bucket (docs/learned.md)."""
        member, count = self.rendezvous.member, self.rendezvous.num_members
        payload_receiver = self.receive_payloads(push_number)
        payloads = [payload_receiver.payload(RelaySource(source)) for source in range(count)]
        payloads[member] = payload_receiver.relay_payload()
        arrived_bucket: tuple[BufferPayload, int, int, torch.Tensor] | None = None
        largest_payload = max(payloads, key=lambda payload: payload.num_bytes)
        for start, end in _bucket_ranges(largest_payload, RELAY_BUCKET_BYTES):
            ends = [max(start, min(end, payload.num_bytes)) for payload in payloads]
            send_buffer = torch.empty(ends[member] - start, dtype=torch.uint8)
            if len(send_buffer):
                payloads[member].pack(start, ends[member], send_buffer)
            for hop in range(1, count):
                source = (member - hop) % count
                receive_buffer = torch.empty(ends[source] - start, dtype=torch.uint8)
                works = (
                    [group.send([send_buffer], (member + hop) % count, 0)]
                    if len(send_buffer)
                    else []
                )
                works += [group.recv([receive_buffer], source, 0)] if len(receive_buffer) else []
                if arrived_bucket:
                    arrived_bucket[0].unpack(*arrived_bucket[1:])
                for work in works:
                    _wait_for(work, self.rendezvous, RELAY_GRACE_AFTER_LIMIT_SECONDS)
                arrived_bucket = None
                if len(receive_buffer):
                    arrived_bucket = payloads[source], start, ends[source], receive_buffer
        if arrived_bucket:
            arrived_bucket[0].unpack(*arrived_bucket[1:])
        relays = [
            source for source in self.received_chunks.chunks if isinstance(source, RelaySource)
        ]
        self.verify_checksums(push_number, relays)


def _bucket_ranges(payload: Payload, num_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the end of each bucket of a payload, of `num_bytes` (default
    `BUCKET_BYTES`) but for the last."""
    size = num_bytes or BUCKET_BYTES
    for start in range(0, payload.num_bytes, size):
        yield start, min(start + size, payload.num_bytes)


class GlooSender(Sender):
    """The sending end over gloo: packs a bucket while the one before is on the wire."""

    def connect(self) -> None:
        """Make the group of this rank and the engine's rank."""
        self._group = pair_group(
            self.rendezvous, self.trainer_rank, self.engine_rank, is_sender=True
        )

    def send(self, push_number: int, chunk_tensors: ChunkTensors) -> None:
        """Send a push: its number, then its payload in buckets."""
        group = self._group
        _wait_for(group.send([torch.tensor([push_number])], ENGINE_RANK, 0), self.rendezvous)
        payload = LinkPayload(self.table, self.chunks, chunk_tensors, uses_weighted_sum=False)
        on_the_wire: tuple[dist.Work, torch.Tensor] | None = None
        for start, end in _bucket_ranges(payload):
            bucket = torch.empty(end - start, dtype=torch.uint8)
            payload.pack(start, end, bucket)
            if on_the_wire:
                _wait_for(on_the_wire[0], self.rendezvous)
            on_the_wire = group.send([bucket], ENGINE_RANK, 0), bucket
        if on_the_wire:
            _wait_for(on_the_wire[0], self.rendezvous)

    def close(self) -> None:
        """Abort the group, which closes its connection."""
        if hasattr(self, "_group"):
            self._group.abort()
            del self._group  # closes the connection


def pair_group(
    rendezvous: Rendezvous, trainer_rank: int, engine_rank: int, *, is_sender: bool
) -> dist.ProcessGroup:
    """Return the group of a trainer rank and an engine rank.

    Args:
        rendezvous: that of the engine in its set.
        trainer_rank: the sender.
        engine_rank: the rank within the engine.
        is_sender: whether this process is the trainer rank."""
    name = f"pair/{trainer_rank}/{rendezvous.member}/{engine_rank}"
    return _create_group(rendezvous, name, TRAINER_RANK if is_sender else ENGINE_RANK, 2)


def _create_group(rendezvous: Rendezvous, name: str, rank: int, size: int) -> dist.ProcessGroup:
    """Return the group of `size` ranks that meet under `name`.

    Args:
        rendezvous: where the members meet.
        name: the group's name in the store.
        rank: this process's rank in it.
        size: the number of its members."""
    store = dist.PrefixStore(name, rendezvous.new_connection())
    timeout = datetime.timedelta(seconds=rendezvous.timeout_seconds)
    # The stubs give a backend no send and recv.
    return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, timeout))


def _wait_for(work: dist.Work, rendezvous: Rendezvous, more_seconds: float = 0.0) -> None:
    """Wait for `work`, at most as long as a push may take, and `more_seconds`."""
    work.wait(datetime.timedelta(seconds=rendezvous.push_timeout_seconds + more_seconds))
