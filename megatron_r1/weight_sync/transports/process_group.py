"""Transport between hosts: torch.distributed point to point, gloo (host memory) or NCCL (GPUs). The
receiving end is completed in `exchange`, where engines pass on what they have received.

Every pair of a trainer and an engine rank with something to exchange is a process group of two, so
that a lost rank breaks its own pairs only. A push is a stream of buckets: one is on the wire while
another is packed, or unpacked; the checksums follow each window. A push is sent whole, or as the
difference to the pair's last push; then every bucket's length precedes it.

With NCCL, buckets are packed and checksums computed on the GPUs, where the receive buffer is as
well. Headers, lengths and checksums travel over a gloo group beside it: no GPU waits for a push. So
do the buckets of a trainer and an engine rank that share a GPU, which NCCL refuses."""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from megatron_r1.weight_sync.receive.rendezvous import SetFailed
from megatron_r1.weight_sync.receive.table import Delivery, SlotTable, dtype_of
from megatron_r1.weight_sync.transports import delta
from megatron_r1.weight_sync.transports.base import Receiver, Sender, Slices
from megatron_r1.weight_sync.transports.buckets import Buckets, Chunk
from megatron_r1.weight_sync.verify.checksum import RowsChecksum, RowsWeightedSum

CLOSE_SECONDS = 2.0
IDLE_SECONDS = 30 * 24 * 3600.0
"""The time that a receiver waits for the next push to begin."""


class Header(NamedTuple):
    """Header of one window on the wire. base: the push to which this one is the difference; 0: it
    is whole."""

    push: int
    window: int
    base: int


class Groups(NamedTuple):
    """Two groups of the same ranks: for integers in host memory, and for buckets, on `device`."""

    control: dist.ProcessGroup
    data: dist.ProcessGroup
    device: torch.device

    def abort(self) -> None:
        for group in {self.control, self.data}:
            group.abort()


class PairReceiver(Receiver):
    """A thread per trainer rank receives its windows."""

    backend = "gloo"
    device = torch.device("cpu")

    def prepare(self) -> None:
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        self._groups: list[Groups] = []

    def allocate(self) -> torch.Tensor:
        size = self.table.areas * self.table.num_bytes
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def reusable_memory(self, table: SlotTable) -> torch.Tensor | None:
        if table != self.table or any(thread.is_alive() for thread in self._threads):
            return None
        return self.memory

    def connect(self) -> None:
        self._start(self._connect, name="connecting")

    def _connect(self) -> None:
        """Connect the pairs one after another; a trainer rank connects all of its own at once, so
        no two ranks can wait for each other's next pair."""
        for sender in self.senders:
            try:
                groups = pair(self, sender, self.rank, is_sender=False)
            except Exception as error:  # noqa: BLE001 - raised by the push that waits
                self._fail(sender, error)
                continue
            self._groups.append(groups)
            self._start(self._receive, sender, groups, name=f"from rank {sender}")

    def _start(self, function: Callable[..., None], *arguments: object, name: str) -> None:
        thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        self._is_closing = True
        for groups in self._groups:
            groups.abort()
        # A thread that is still in a call when the interpreter ends would abort the process.
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def claim_memory(self) -> None:
        """Allocate memory that is borrowed; called before a window is written."""

    def begins(self, sender: int, header: Header) -> None:
        """Do nothing: called when a window begins to arrive."""

    def arrived(self, sender: int, header: Header, index: int, checksum: int) -> None:
        """Check deliveries[sender][index], which is in the memory."""
        self.buffer.arrived(sender, header.push, index, checksum)

    def fail(self, error: Exception) -> None:
        """Report to the set and to this engine that nothing more will arrive."""
        with contextlib.suppress(RuntimeError):  # the trainer, and with it the store, is gone
            error = SetFailed(self.rendezvous.report_own(self.rank, str(error)))
        self.buffer.fail(error)

    def _receive(self, sender: int, groups: Groups) -> None:
        last = 0
        try:
            while not self._is_closing:
                fields = torch.empty(len(Header._fields), dtype=torch.int64)
                groups.control.recv([fields], 1, 0).wait(datetime.timedelta(seconds=IDLE_SECONDS))
                header = Header(*fields.tolist())
                if header.base not in (0, last):
                    raise ValueError(
                        f"push {header.push} is the difference to push {header.base}, but this "
                        f"rank has push {last}"
                    )
                self.claim_memory()
                self.begins(sender, header)
                self._receive_window(groups, sender, header)
                last = header.push
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            self._fail(sender, error)
            # The last reference closes the connection, so that the sender fails at once.
            if groups in self._groups:
                self._groups.remove(groups)
            del groups

    def _fail(self, sender: int, error: Exception) -> None:
        if not self._is_closing:
            self.fail(RuntimeError(f"trainer rank {sender}: {error}"))

    def _receive_window(self, groups: Groups, sender: int, header: Header) -> None:
        buckets = Buckets(self.table, self.buffer.deliveries[sender])
        indices = self.buffer.windows[sender][header.window]
        arriving: tuple[dist.Work, torch.Tensor, list[Chunk]] | None = None
        for bucket in buckets.of(indices):
            size = buckets.num_bytes(bucket)
            if header.base:
                length = torch.empty(1, dtype=torch.int64)
                finish(groups.control.recv([length], 1, 0), self)
                size = int(length)
            data = torch.empty(size, dtype=torch.uint8, device=groups.device)
            work = groups.data.recv([data], 1, 0)
            if arriving:
                self._unpack(header, buckets, *arriving)
            arriving = (work, data, bucket)
        if arriving:
            self._unpack(header, buckets, *arriving)
        sums = torch.empty(len(indices), dtype=torch.int64)
        finish(groups.control.recv([sums], 1, 0), self)
        for index, sent in zip(indices, sums.tolist(), strict=True):
            self.arrived(sender, header, index, sent % 2**64)

    def _unpack(
        self,
        header: Header,
        buckets: Buckets,
        work: dist.Work,
        data: torch.Tensor,
        bucket: list[Chunk],
    ) -> None:
        finish(work, self, on_gpu=data.is_cuda)
        packed = data.to(self.device)
        if header.base:
            # The base is in another area than this push where areas alternate.
            state = buckets.pack(self.table.area(self.memory, header.base), bucket).cpu()
            delta.patch(state, packed.cpu())
            packed = state.to(self.device)
        buckets.unpack(self.table.area(self.memory, header.push), bucket, packed)


class GlooSender(Sender):
    """Packs a bucket while the one before is on the wire."""

    backend = "gloo"
    device = torch.device("cpu")
    is_weighted = False

    _base = 0
    """The push whose bytes `_sent` holds, by bucket; 0: none that the receiver has whole."""
    _since_full = 0
    num_bytes_sent = 0
    """Bytes of the last window, as it was sent."""

    def plan(self, deliveries: Sequence[Delivery]) -> None:
        self._sent: list[torch.Tensor] = []
        if self.full_every > 1 and self.table.num_windows > 1:
            raise ValueError(
                f"push.delta: an engine rank receives weights in {self.table.num_windows} windows, "
                "and each overwrites the base of the next push's difference; raise "
                "push.memory_gib until all fit, or set push.delta: false"
            )
        super().plan(deliveries)

    def connect(self) -> None:
        self._groups = pair(self, self.sender, self.rank, is_sender=True)

    def send(self, push: int, window: int, slices: Slices) -> None:
        self.await_free_memory(push, window)
        (control, data, device), indices = self._groups, self.windows[window]
        if not indices:
            return
        is_full = self._base == 0 or self._since_full + 1 >= self.full_every
        header = Header(push, window, 0 if is_full else self._base)
        self._base = 0  # a push that breaks off cannot be the base of another
        finish(control.send([_integers(header)], 0, 0), self)
        running = {index: self._checksum(index) for index in indices}
        on_the_wire: list[tuple[dist.Work, torch.Tensor]] = []
        self.num_bytes_sent = 0
        for number, bucket in enumerate(Buckets(self.table, self.deliveries).of(indices)):
            packed = self._packed(bucket, slices, running)
            message = self._message(number, packed, header).to(device)
            for work, sent in on_the_wire:
                finish(work, self, on_gpu=sent.is_cuda)
            on_the_wire = []
            if header.base:
                length = _integers([len(message)])
                on_the_wire.append((control.send([length], 0, 0), length))
            on_the_wire.append((data.send([message], 0, 0), message))
            self.num_bytes_sent += sum(sent.nbytes for _, sent in on_the_wire)
        for work, sent in on_the_wire:
            finish(work, self, on_gpu=sent.is_cuda)
        sums = [running[index].digest() for index in indices]
        signed = _integers(s - 2**64 if s >= 2**63 else s for s in sums)
        finish(control.send([signed], 0, 0), self)
        if self.full_every > 1:
            self._base, self._since_full = push, 0 if is_full else self._since_full + 1

    def close(self) -> None:
        self._sent = []
        if hasattr(self, "_groups"):
            self._groups.abort()
            del self._groups  # closes the connection

    def _checksum(self, index: int) -> RowsChecksum | RowsWeightedSum:
        if self.is_weighted:
            return RowsWeightedSum()
        return RowsChecksum(self.deliveries[index].row_bytes(self.table))

    def _packed(
        self,
        bucket: list[Chunk],
        slices: Slices,
        running: dict[int, RowsChecksum | RowsWeightedSum],
    ) -> torch.Tensor:
        """Return a bucket's bytes on the device, in the engine's dtypes, and update checksums."""
        packed = []
        for index, top, bottom in bucket:
            dtype = dtype_of(self.table.slots[self.deliveries[index].slot])
            values = slices[index][top:bottom].to(self.device, dtype).contiguous()
            running[index].update(values)
            packed.append(values.reshape(-1).view(torch.uint8))
        return torch.cat(packed)

    def _message(self, number: int, packed: torch.Tensor, header: Header) -> torch.Tensor:
        """Return the message of bucket `number`; with deltas, keep it on the host for the next
        push."""
        if self.full_every == 1:
            return packed
        message, on_host = packed, packed.cpu()
        if header.base:
            message = delta.encode(on_host, self._sent[number]).to(self.device)
        self._sent[number : number + 1] = [on_host]
        return message


def _integers(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def finish(
    work: dist.Work,
    end: PairReceiver | GlooSender,
    more_seconds: float = 0.0,
    *,
    on_gpu: bool = False,
) -> None:
    """Wait for `work`, at most as long as a push may take, and `more_seconds`. on_gpu: it is
    NCCL's."""
    if on_gpu:
        work.wait()  # a timeout here would block the host; `groups` has set the group's
    else:
        work.wait(datetime.timedelta(seconds=end.rendezvous.push_seconds + more_seconds))


def pair(end: PairReceiver | GlooSender, sender: int, rank: int, *, is_sender: bool) -> Groups:
    """Return the groups of an engine rank (rank 0 in them) and a trainer rank (rank 1 in them)."""
    name = f"pair/{sender}/{end.rendezvous.member}/{rank}"
    return groups(end, name, 1 if is_sender else 0, 2, may_share_gpu=True)


def groups(
    end: PairReceiver | GlooSender, name: str, rank: int, size: int, *, may_share_gpu: bool = False
) -> Groups:
    """Return the groups of `size` ranks that meet under `name`.

    may_share_gpu: both ranks may be on one GPU."""
    rendezvous = end.rendezvous
    store = dist.PrefixStore(name, rendezvous.client())
    timeout = datetime.timedelta(seconds=rendezvous.timeout_seconds)
    # The stubs give a backend no send and recv.
    control = cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, timeout))
    if end.backend == "gloo" or (may_share_gpu and _share_a_gpu(control, end.device)):
        return Groups(control, control, torch.device("cpu"))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=rendezvous.push_seconds)
    store = dist.PrefixStore("nccl", store)
    data = dist.ProcessGroupNCCL(store, rank, size, options)
    return Groups(control, cast(dist.ProcessGroup, data), end.device)


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU: processes number GPUs differently."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _share_a_gpu(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether both ranks of `group` compute on the same GPU."""
    own = torch.tensor(list(gpu_uuid(device).encode()))
    both = torch.empty(2 * len(own), dtype=own.dtype)
    group._allgather_base(both, own, AllgatherOptions()).wait()
    first, second = both.chunk(2)
    return torch.equal(first, second)


class NcclSender(GlooSender):
    """A `GlooSender` between GPUs, packed in device memory.

    Run on null GPUs only (tests/nullgpu)."""

    backend, is_weighted = "nccl", True

    def connect(self) -> None:
        # Of this thread: `run_all` has set it. A thread of NCCL's would take GPU 0.
        self.device = torch.device("cuda", torch.cuda.current_device())
        super().connect()
