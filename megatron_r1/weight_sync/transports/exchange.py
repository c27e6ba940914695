"""Receives what enters this engine of a set, and passes it on to the others.

An engine rank receives its part from a few trainer ranks, as in `process_group`, checks it, and
exchanges it with the ranks at its position of the other engines. In every round each contributes a
bucket, and every rank ends with all of them: around a ring over gloo, by an all-gather over NCCL
(`_gather`). The checksums that it passes on are the trainer's own.
Every group is created in a thread of its own, and within one group all ranks make the same calls in
the same order, which follow from the plan; what enters never waits for the exchange. So no rank can
wait in a circle. In a set of one engine nothing is exchanged."""

import contextlib
import datetime
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_r1.weight_sync.receive.errors import IncompletePush
from megatron_r1.weight_sync.receive.rendezvous import Peer, SetFailed
from megatron_r1.weight_sync.receive.table import Delivery, by_window
from megatron_r1.weight_sync.transports import PASSED_BYTES
from megatron_r1.weight_sync.transports.buckets import Buckets, Chunk
from megatron_r1.weight_sync.transports.process_group import (
    IDLE_SECONDS,
    Groups,
    Header,
    PairReceiver,
    finish,
    gpu_uuid,
    groups,
)

PATIENCE_SECONDS = 2.0
"""The time beyond a push's limit that a rank waits for the others, so that the one at fault reports
first."""


class GlooReceiver(PairReceiver):
    """An engine rank of a set."""

    def connect(self) -> None:
        self._shared: Groups | None = None
        held, members = self.buffer.deliveries, range(self.rendezvous.members)
        shares: list[Sequence[Delivery]] = [held.get(Peer(engine), ()) for engine in members]
        own = [(part, (s, i)) for s in self.senders for i, part in enumerate(held[s])]
        own.sort(key=lambda each: each[0].slot)  # as `Rendezvous.plans` does for the others
        shares[self.rendezvous.member] = [part for part, _ in own]
        self._shares, self._places = shares, [place for _, place in own]
        self._windows = [by_window(self.table, share) for share in shares]
        self._sums: dict[tuple[int, int], int] = {}
        self._begun: list[SimpleQueue[Header | None]] = [
            SimpleQueue() for _ in range(self.table.num_windows)
        ]
        super().connect()
        if self.rendezvous.members > 1:
            self._start(self._exchange, name="exchange")

    def close(self) -> None:
        self._is_closing = True
        for queue in getattr(self, "_begun", ()):
            queue.put(None)
        super().close()

    def fail(self, error: Exception) -> None:
        super().fail(error)
        for queue in self._begun:
            queue.put(None)

    def begins(self, sender: int, header: Header) -> None:
        """Note that a window of a push has begun to arrive."""
        windows = self.buffer.windows
        if sender == next(s for s in self.senders if windows[s][header.window]):
            self._begun[header.window].put(header)

    def arrived(self, sender: int, header: Header, index: int, checksum: int) -> None:
        self._sums[sender, index] = checksum
        super().arrived(sender, header, index, checksum)

    def _exchange(self) -> None:
        error = self._exchange_pushes()
        if self._is_closing or self.buffer.has_failed:
            return
        met, text, failure = self.rendezvous, str(error), error
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            if isinstance(error, ValueError):  # what enters this rank is damaged or late
                is_damaged = not isinstance(error, IncompletePush)
                failure = SetFailed(met.report_own(self.rank, text, is_damaged=is_damaged))
            else:
                failure = SetFailed(met.cause(self.rank, text, lambda: self._is_closing))
        self.buffer.fail(failure)

    def _exchange_pushes(self) -> Exception:
        """Exchange push after push until one fails; return the error."""
        try:
            self._shared = shared = self._create_groups()
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
            header = self._begun[window].get()
            if header is not None:
                push[0] = header.push
            elif not self._is_closing:
                raise RuntimeError("what enters this rank broke off")
            others = [e for e in range(self.rendezvous.members) if e != leader]
            for work in [group.send([push], engine, 0) for engine in others]:
                self._finish_control(work)
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
        self._pass_on(shared.data, number, window)
        self._pass_sums_on(group, number, window)
        return number

    def _pass_on(self, group: dist.ProcessGroup, push: int, window: int) -> None:
        """Exchange a window bucket by bucket, each round one of every engine, padded alike."""
        area, mine = self.table.area(self.memory, push), self.rendezvous.member
        buckets = [Buckets(self.table, share) for share in self._shares]
        lists = [
            list(own.of(windows[window], PASSED_BYTES))
            for own, windows in zip(buckets, self._windows, strict=True)
        ]
        arrived: list[tuple[Buckets, list[Chunk], torch.Tensor]] = []
        for number in range(max(map(len, lists))):
            chunks = [of_engine[number : number + 1] for of_engine in lists]
            sizes = [
                own.num_bytes(*bucket) if bucket else 0
                for own, bucket in zip(buckets, chunks, strict=True)
            ]
            gathered = torch.empty(len(sizes) * max(sizes), dtype=torch.uint8, device=self.device)
            parts = gathered.chunk(len(sizes))
            if chunks[mine]:
                parts[mine][: sizes[mine]] = buckets[mine].pack(area, *chunks[mine])
            self._gather(group, gathered, _unpack_each(area, arrived))
            arrived = [
                (buckets[engine], chunks[engine][0], part[: sizes[engine]])
                for engine, part in enumerate(parts)
                if engine != mine and chunks[engine]
            ]
        for _ in _unpack_each(area, arrived):
            pass

    def _gather(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered`, equal parts of all engines, around a ring. Meanwhile unpack the round
        before, a part in each hop.

        gloo's own all-gather takes three times as long with 64 MiB a part (docs/log.md)."""
        mine, members = self.rendezvous.member, self.rendezvous.members
        parts = gathered.chunk(members)
        for hop in range(members - 1):
            passed, coming = parts[(mine - hop) % members], parts[(mine - hop - 1) % members]
            works = [
                group.send([passed], (mine + 1) % members, 0),
                group.recv([coming], (mine - 1) % members, 0),
            ]
            next(unpacking, None)
            for work in works:
                finish(work, self, PATIENCE_SECONDS)

    def _pass_sums_on(self, group: dist.ProcessGroup, push: int, window: int) -> None:
        """Pass the trainer's checksums on, and check what came from the other engines."""
        mine, indices = self.rendezvous.member, [windows[window] for windows in self._windows]
        sums = torch.zeros(max(map(len, indices)), dtype=torch.int64)
        own = [self._sums[self._places[index]] for index in indices[mine]]
        signed = [s - 2**64 if s >= 2**63 else s for s in own]
        sums[: len(own)] = torch.tensor(signed, dtype=torch.int64)
        gathered = torch.empty(len(indices) * len(sums), dtype=torch.int64)
        self._finish_control(group._allgather_base(gathered, sums, self._options))
        for engine, (of_engine, sent) in enumerate(
            zip(indices, gathered.view(len(indices), -1).tolist(), strict=True)
        ):
            if engine != mine:
                for index, checksum in zip(of_engine, sent, strict=False):
                    self.buffer.arrived(Peer(engine), push, index, checksum % 2**64)

    @property
    def _options(self) -> AllgatherOptions:
        options = AllgatherOptions()
        options.timeout = self._patience
        return options

    def _finish_control(self, work: dist.Work) -> None:
        work.wait(self._patience)

    @property
    def _patience(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=self.rendezvous.push_seconds + PATIENCE_SECONDS)

    def _create_groups(self) -> Groups:
        """Return the groups of the ranks at this position, in order of engines."""
        member, members = self.rendezvous.member, self.rendezvous.members
        return groups(self, f"exchange/{self.rank}", member, members)


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
        with self._naming_shortage():
            return super().allocate()

    def claim_memory(self) -> None:
        size = self.table.areas * self.table.num_bytes
        with self._claiming, self._naming_shortage():
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
    def _naming_shortage(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            size = self.table.areas * self.table.num_bytes / 2**30
            raise ValueError(
                f"push.transport: nccl: {size:.3g} GiB are needed on the engine's GPU for weights "
                "in transit; lower push.memory_gib or rollout.gpu_memory, or set push.transport: "
                "gloo"
            ) from error

    def _gather(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered` by one all-gather in place, and meanwhile unpack the round before."""
        own = gathered.chunk(self.rendezvous.members)[self.rendezvous.member]
        work = group._allgather_base(gathered, own, self._options)
        for _ in unpacking:
            pass
        finish(work, self, on_gpu=True)


def _unpack_each(
    area: torch.Tensor, arrived: list[tuple[Buckets, list[Chunk], torch.Tensor]]
) -> Iterator[None]:
    """Unpack parts into the receive buffer, one per step."""
    for own, bucket, packed in arrived:
        own.unpack(area, bucket, packed)
        yield
