"""The push over NCCL without the CUDA packages: streams and NCCL are the null GPU's, memory is the
host's, and torch computes on the CPU, at once. A thread has a null GPU of its own.

`python host_push.py MODEL ENGINES PLACE …` runs three pushes from all ranks of a trainer to all
ranks of a set of engines, in threads, and compares each with plain slicing; then the next case.
PLACE: `pool`, or `colocated`, on the trainer's GPUs."""

import contextlib
import sys
import threading

# Before torch: a CUDA build of it loads CUDA's runtime, whose functions would be found first.
from null_cuda import NON_BLOCKING, NOT_READY, call, done, made, stream  # isort: skip

import torch

from megatron_r1.push import round_sender
from megatron_r1.push.matching import rounds
from megatron_r1.push.sender import WeightSender
from megatron_r1.push.transports import nccl

THREAD = threading.local()
mapped: dict[str, torch.Tensor] = {}
"""Shared memory by its address: ranks are threads of one process."""


def use_gpu(number: int) -> None:
    """Give this thread a null GPU."""
    THREAD.gpu = number
    done("cudaSetDevice", number)


def gpu_name(number: int) -> str:
    return f"GPU {number}"


class HostStreams:
    """`PushStreams` where copies are done at once, by the host."""

    def __init__(self, gpu):
        use_gpu(gpu)
        self.device, self._transfers = torch.device("cpu"), stream(NON_BLOCKING)

    def copy_stream(self):
        return contextlib.nullcontext()

    def order_copies_after_current(self):
        pass

    def order_transfers_after_copies(self):
        return self._transfers

    def transfers_ended(self):
        event = made("cudaEventCreate")
        done("cudaEventRecord", event, self._transfers)
        return lambda: call("cudaEventQuery", event) != NOT_READY

    def copies_ended(self):
        return lambda: True


class HostReceiver(nccl.NCCLReceiver):
    def prepare(self):
        super().prepare()
        self.device = torch.device("cpu")


def share(memory):
    mapped[str(memory.data_ptr())] = memory
    return str(memory.data_ptr())


def install() -> None:
    """Let this process push so."""
    torch.cuda.current_device = lambda: THREAD.gpu
    nccl.PushStreams = round_sender.PushStreams = HostStreams
    nccl.gpu_uuid, nccl.export_ipc_handle = gpu_name, share
    round_sender.open_ipc_handle = lambda address: mapped[address].view(torch.uint8)


def main(case: str, engines: int, *, is_colocated: bool) -> None:
    from tests.unit.null_gpu.push_processes import (
        CASES,
        RELAY_BUCKET_BYTES,
        SCATTER_BUCKET_BYTES,
        tensors_of,
    )
    from tests.unit.push import push_world

    hf_config, grid, layout = CASES[case]
    rounds.SCATTER_BUCKET_BYTES = SCATTER_BUCKET_BYTES
    rounds.RELAY_BUCKET_BYTES = RELAY_BUCKET_BYTES
    first = 0 if is_colocated else grid.world_size

    class ThreadSender(WeightSender):
        def __init__(self, *arguments, **options):
            gpus = [gpu_name(number) for number in range(grid.world_size)]
            super().__init__(*arguments, gpus=gpus, **options)

        def connect(self, *arguments):
            use_gpu(self.rank)
            return super().connect(*arguments)

        def send(self, *arguments):
            use_gpu(self.rank)
            return super().send(*arguments)

    def receiver(rendezvous, rank, table):
        use_gpu(first + rendezvous.member * layout.ranks_per_engine + rank)
        return HostReceiver(rendezvous, rank, table, allocates_per_push=is_colocated)

    push_world.WeightSender, push_world.receiver_class = ThreadSender, lambda transport: receiver
    tensors = tensors_of(hf_config, 0)
    world = push_world.World(
        hf_config,
        grid,
        layout,
        tensors,
        transport="nccl",
        engines=engines,
        table=push_world.plain_table,
    )
    for number in (1, 2, 3):
        world.push(number)
        wrong = push_world.wrong_slots(world, tensors, number)
        assert wrong == [], wrong
        if is_colocated:
            for each in world.receivers.values():
                each.free_memory()
                assert not each.memory.untyped_storage().nbytes()
        for held in world.held:
            for parameter in {id(p): p for pieces in held.values() for p, _ in pieces}.values():
                parameter.mul_(-2)
        tensors = {name: -2 * tensor for name, tensor in tensors.items()}
    world.close()


if __name__ == "__main__":
    install()
    words = iter(sys.argv[1:])
    for case, engines, place in zip(words, words, words, strict=True):
        main(case, int(engines), is_colocated=place == "colocated")
