"""Both ends over NCCL: the receive buffer is on the engine rank's GPU, and buckets are packed on
the trainer rank's."""

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_r1.weight_sync.transports.base import gpu_uuid
from megatron_r1.weight_sync.transports.gloo import GlooReceiver, GlooSender
from megatron_r1.weight_sync.transports.groups import wait_for


class NcclReceiver(GlooReceiver):
    """A `GlooReceiver` between GPUs, with the receive buffer in device memory.

    Borrowed memory is allocated when a push begins and freed once it is loaded. Between pushes the
    engine's KV cache has it; the cache sleeps during a push.
    Run on null GPUs only (tests/nullgpu)."""

    backend, is_weighted = "nccl", True

    def prepare(self) -> None:
        super().prepare()
        # The current device of this thread, vLLM's: in the receiving threads it is GPU 0.
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.address = gpu_uuid(self.device)  # by which the plan avoids senders on this GPU
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
            # Its storage, because views may be left, which would keep it allocated. What they show
            # is not used any more.
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
                "in transit; lower rollout.gpu_memory, give each engine more GPUs, or set "
                "push.transport: gloo"
            ) from error

    def _gather_buckets(
        self, group: dist.ProcessGroup, gathered: torch.Tensor, unpacking: Iterator[None]
    ) -> None:
        """Fill `gathered` by one all-gather in place; meanwhile unpack the round before."""
        own = gathered.chunk(self.rendezvous.num_members)[self.rendezvous.member]
        work = group._allgather_base(gathered, own, self._options)
        for _ in unpacking:
            pass
        wait_for(work, self.rendezvous, on_gpu=True)


class NcclSender(GlooSender):
    """A `GlooSender` between GPUs, packed in device memory.

    Run on null GPUs only (tests/nullgpu)."""

    backend, is_weighted = "nccl", True

    def connect(self) -> None:
        # The current device of this thread, which `run_all` has set: in NCCL's threads it is GPU 0.
        self.device = torch.device("cuda", torch.cuda.current_device())
        super().connect()
