"""Receives what enters this engine of a set, and passes it on to the others.

An engine rank receives its part from a few trainer ranks, as in `pair_receiver`, checks it, and
exchanges it with the ranks at its position of the other engines. In every round each contributes a
bucket, and every rank ends with all of them: around a ring over gloo, by an all-gather over NCCL
(`_gather_parts`). The checksums that it passes on are the trainer's own.
Every group is created in a thread of its own, and within one group all ranks make the same calls in
the same order, which follow from the plan; what enters never waits for the exchange. So no rank can
wait in a circle. In a set of one engine nothing is exchanged."""

import contextlib
import datetime
import threading
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_r1.weight_sync.receive.errors import IncompletePush
from megatron_r1.weight_sync.rendezvous.engine import Peer
from megatron_r1.weight_sync.rendezvous.failure import SetFailed
from megatron_r1.weight_sync.table import Delivery, by_window
from megatron_r1.weight_sync.transports import PASSED_BYTES
from megatron_r1.weight_sync.transports.base import gpu_uuid
from megatron_r1.weight_sync.transports.buckets import Buckets, Chunk
from megatron_r1.weight_sync.transports.groups import (
    Groups,
    Header,
    create_groups,
    integers,
    wait_for,
)
from megatron_r1.weight_sync.transports.pair_receiver import IDLE_SECONDS, PairReceiver

PATIENCE_SECONDS = 2.0
"""The time beyond a push's limit that a rank waits for the others, so that the one at fault reports
first."""


class GlooReceiver(PairReceiver):
    """An engine rank of a set."""

    def connect(self) -> None:
        self._shared: Groups | None = None
        deliveries, members = self.buffer.deliveries, range(self.rendezvous.num_members)
        # What enters each engine of the set from trainer ranks.
        shares: list[Sequence[Delivery]] = [deliveries.get(Peer(engine), ()) for engine in members]
        own = [
            (delivery, (sender, index))
            for sender in self.senders
            for index, delivery in enumerate(deliveries[sender])
        ]
        own.sort(
            key=lambda entry: entry[0].slot
        )  # as `EngineRendezvous.read_plan` does for the others
        shares[self.rendezvous.member] = [delivery for delivery, _ in own]
        self._shares, self._own_sources = shares, [source for _, source in own]
        self._windows = [by_window(self.table, share) for share in shares]
        self._begun_windows: list[SimpleQueue[Header | None]] = [
            SimpleQueue() for _ in range(self.table.num_windows)
        ]
        super().connect()
        if self.rendezvous.num_members > 1:
            self._start_thread(self._run_exchange, name="exchange")

    def close(self) -> None:
        self._is_closing = True
        for queue in getattr(self, "_begun_windows", ()):
            queue.put(None)
        super().close()

    def fail(self, error: Exception) -> None:
        super().fail(error)
        for queue in self._begun_windows:
            queue.put(None)

    def window_begins(self, sender: int, header: Header) -> None:
        windows = self.buffer.windows
        if sender == next(s for s in self.senders if windows[s][header.window]):
            self._begun_windows[header.window].put(header)

    def _run_exchange(self) -> None:
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
                for window in range(self.table.num_windows):
                    push = self._exchange_window(shared, window)
                self.rendezvous.publish_complete(push)
        except (ValueError, RuntimeError, OSError) as error:
            return error.with_traceback(None)  # whose frames hold the group
        finally:
            # Without a reference its connections are closed, and the others' calls fail: before
            # this rank asks who has died, because a rank answers only once its call has failed.
            if self._shared is not None:
                self._groups.remove(self._shared)
                self._shared = None

    def _exchange_window(self, shared: Groups, window: int) -> int:
        """Wait for the next push's window, exchange it, and return the push's number."""
        leader = next(e for e, windows in enumerate(self._windows) if windows[window])
        group = shared.control
        push = torch.zeros(1, dtype=torch.int64)  # 0: the leader closes
        if leader == self.rendezvous.member:
            header = self._begun_windows[window].get()
            if header is not None:
                push[0] = header.push
            elif not self._is_closing:
                raise RuntimeError("what enters this rank broke off")
            others = [e for e in range(self.rendezvous.num_members) if e != leader]
            for work in [group.send([push], engine, 0) for engine in others]:
                self._wait_for(work)
        else:  # gloo cannot end a wait for the next push; the leader's closing does
            group.recv([push], leader, 0).wait(datetime.timedelta(seconds=IDLE_SECONDS))
        if self._is_closing or not int(push):
            raise RuntimeError(f"engine {leader} of the set has ended")
        number, seconds = int(push), self.rendezvous.push_seconds
        if self.senders:
            self.buffer.wait(number, window, seconds, self.senders)
        if window >= 2:
            self.rendezvous.await_release(self.rank, number, window - 2)
        self.claim_memory()
        self._exchange_buckets(shared.data, number, window)
        self._exchange_checksums(group, number, window)
        return number

    def _exchange_buckets(self, group: dist.ProcessGroup, push: int, window: int) -> None:
        """Exchange a window bucket by bucket, each round one of every engine, padded alike."""
        area, member = self.table.area(self.memory, push), self.rendezvous.member
        buckets = [Buckets(self.table, share) for share in self._shares]
        cuts = [
            share.cut(windows[window], PASSED_BYTES)
            for share, windows in zip(buckets, self._windows, strict=True)
        ]
        arrived: list[tuple[Buckets, list[Chunk], torch.Tensor]] = []
        for chunks in zip_longest(*cuts, fillvalue=[]):
            sizes = [share.num_bytes(bucket) for share, bucket in zip(buckets, chunks, strict=True)]
            gathered = torch.empty(len(sizes) * max(sizes), dtype=torch.uint8, device=self.device)
            parts = gathered.chunk(len(sizes))
            if chunks[member]:
                parts[member][: sizes[member]] = buckets[member].pack(area, chunks[member])
            self._gather_parts(group, gathered, _unpack_each(area, arrived))
            arrived = [
                (buckets[engine], chunks[engine], part[: sizes[engine]])
                for engine, part in enumerate(parts)
                if engine != member and chunks[engine]
            ]
        for _ in _unpack_each(area, arrived):
            pass

    def _gather_parts(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered`, equal parts of all engines, around a ring. Meanwhile unpack the round
        before, a part in each hop.

        gloo's own all-gather takes three times as long with 64 MiB a part (docs/log.md)."""
        member, members = self.rendezvous.member, self.rendezvous.num_members
        parts = gathered.chunk(members)
        for hop in range(members - 1):
            sent, received = parts[(member - hop) % members], parts[(member - hop - 1) % members]
            works = [
                group.send([sent], (member + 1) % members, 0),
                group.recv([received], (member - 1) % members, 0),
            ]
            next(unpacking, None)
            for work in works:
                self._wait_for(work)

    def _exchange_checksums(self, group: dist.ProcessGroup, push: int, window: int) -> None:
        """Exchange the trainer's checksums, and check by them what the other engines passed on."""
        member, indices = self.rendezvous.member, [windows[window] for windows in self._windows]
        sums = torch.zeros(max(map(len, indices)), dtype=torch.int64)
        own = [self.buffer.checksums[self._own_sources[index]] for index in indices[member]]
        sums[: len(own)] = integers(own)
        gathered = torch.empty(len(indices) * len(sums), dtype=torch.int64)
        self._wait_for(group._allgather_base(gathered, sums, self._options))
        for engine, (engine_indices, engine_sums) in enumerate(
            zip(indices, gathered.view(len(indices), -1).tolist(), strict=True)
        ):
            if engine != member:
                for index, checksum in zip(engine_indices, engine_sums, strict=False):
                    self.buffer.delivery_arrived(Peer(engine), push, index, checksum % 2**64)

    @property
    def _options(self) -> AllgatherOptions:
        options = AllgatherOptions()
        seconds = self.rendezvous.push_seconds + PATIENCE_SECONDS
        options.timeout = datetime.timedelta(seconds=seconds)
        return options

    def _wait_for(self, work: dist.Work) -> None:
        wait_for(work, self.rendezvous, PATIENCE_SECONDS)


class NcclReceiver(GlooReceiver):
    """A `GlooReceiver` between GPUs, with the receive buffer in device memory.

    Memory that is borrowed is allocated with the first window of a push and freed once all is
    loaded: the engine's KV cache, which sleeps meanwhile, has it between pushes.
    Run on null GPUs only (tests/nullgpu)."""

    backend, is_weighted = "nccl", True

    def prepare(self) -> None:
        super().prepare()
        # Of this thread, vLLM's. The receiving threads would take GPU 0.
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.address = gpu_uuid(self.device)  # by which the plan avoids senders on it
        self._claiming = threading.Lock()

    def allocate(self) -> torch.Tensor:
        if self.borrows_memory:
            return torch.empty(0, dtype=torch.uint8, device=self.device)  # `claim_memory` has it
        with self._memory_error():
            return super().allocate()

    def claim_memory(self) -> None:
        size = self.table.areas * self.table.num_bytes
        with self._claiming, self._memory_error():
            if self.memory.numel() < size:
                self.memory = self.buffer.memory = super().allocate()
            elif not (storage := self.memory.untyped_storage()).nbytes():
                storage.resize_(size)

    def close(self) -> None:
        super().close()
        if not any(thread.is_alive() for thread in self._threads):
            self.free_memory()  # after a push that broke off

    def free_memory(self) -> None:
        if self.borrows_memory and hasattr(self, "memory"):
            # The storage, since views of it may be left; what they show is not used any more.
            self.memory.untyped_storage().resize_(0)
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _memory_error(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            size = self.table.areas * self.table.num_bytes / 2**30
            raise ValueError(
                f"push.transport: nccl: {size:.3g} GiB are needed on the engine's GPU for weights "
                "in transit; lower push.memory_gib or rollout.gpu_memory, or set push.transport: "
                "gloo"
            ) from error

    def _gather_parts(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered` by one all-gather in place, and meanwhile unpack the round before."""
        own = gathered.chunk(self.rendezvous.num_members)[self.rendezvous.member]
        work = group._allgather_base(gathered, own, self._options)
        for _ in unpacking:
            pass
        wait_for(work, self.rendezvous, on_gpu=True)


def _unpack_each(
    area: torch.Tensor, arrived: list[tuple[Buckets, list[Chunk], torch.Tensor]]
) -> Iterator[None]:
    """Unpack parts into the receive buffer, one per step."""
    for buckets, bucket, packed in arrived:
        buckets.unpack(area, bucket, packed)
        yield
