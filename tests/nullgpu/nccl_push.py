"""Pushes over NCCL from all ranks of a trainer to all ranks of a set of engines, each on a null GPU
of its own, in threads of this process: `nccl_push.py MODEL ENGINES [colocated]`. colocated: each
engine rank is on the GPU of a trainer rank, and has its receive buffer only during a push.

Every engine must have every slice after each push, by plain slicing."""

import functools
import sys
import threading
from dataclasses import dataclass

import torch
from host_compute import compute_everywhere

from megatron_r1.weight_sync.plan import EngineLayout, TrainerGrid
from megatron_r1.weight_sync.sender import WeightSender
from megatron_r1.weight_sync.table import slot_view
from megatron_r1.weight_sync.transports.base import Receiver
from tests.unit.weight_sync import push_world
from tests.unit.weight_sync.push_models import DEEPSEEK, QWEN

CASES = {
    "qwen": (QWEN, TrainerGrid(2, tensor=2), EngineLayout()),
    "deepseek": (DEEPSEEK, TrainerGrid(4, expert=4), EngineLayout(tensor=2)),
}


@functools.cache
def own_stream(rank: int) -> torch.cuda.Stream:
    """A trainer rank's stream: the default one is the engine's on its GPU, which in a cluster is
    another process."""
    return torch.cuda.Stream(rank)


def inherit_streams() -> None:
    """Have threads begin with the GPU and the stream of the thread that starts them."""
    start, run = threading.Thread.start, threading.Thread.run

    def start_there(thread: threading.Thread) -> None:
        thread.stream = torch.cuda.current_stream()
        start(thread)

    def run_there(thread: threading.Thread) -> None:
        with torch.cuda.stream(thread.stream):
            run(thread)

    threading.Thread.start, threading.Thread.run = start_there, run_there


@dataclass
class Placement:
    """The GPU of every rank: a trainer rank's is its number, then come the engines' one after
    another, from GPU `first_engine` on."""

    first_engine: int
    engine_ranks: int
    borrows_memory: bool

    def install(self) -> None:
        connect, send, receiver_class = (
            WeightSender.connect,
            WeightSender.send,
            push_world.receiver_class,
        )

        def connect_there(sender, *args, **kwargs):
            with torch.cuda.stream(own_stream(sender.rank)):
                return connect(sender, *args, **kwargs)

        def send_there(sender, *args, **kwargs):
            with torch.cuda.stream(own_stream(sender.rank)):
                return send(sender, *args, **kwargs)

        def receiver_there(transport):
            def make(rendezvous, rank, table) -> Receiver:
                engine = rendezvous.member * self.engine_ranks
                torch.cuda.set_device(self.first_engine + engine + rank)
                receiver = receiver_class(transport)
                return receiver(rendezvous, rank, table, borrows_memory=self.borrows_memory)

            return make

        WeightSender.connect, WeightSender.send = connect_there, send_there
        push_world.receiver_class = receiver_there


def assert_delivered(world: push_world.World, tensors: dict, number: int) -> None:
    devices = {receiver.memory.device for receiver in world.receivers.values()}
    assert len(devices) == len(world.receivers) and all(at.type == "cuda" for at in devices)
    for place, receiver in world.receivers.items():
        area = receiver.table.area(receiver.memory, number).cpu()
        for slot in receiver.table.slots:
            whole = tensors[slot.name]
            whole = whole if whole.dim() > 1 else whole[:, None]
            expected = whole[slot.top : slot.bottom, slot.left : slot.right]
            assert torch.equal(slot_view(area, slot), expected.bfloat16()), (place, slot.name)


def assert_memory_returns(world: push_world.World) -> None:
    for receiver in world.receivers.values():
        device, size = receiver.memory.device, receiver.memory.nbytes
        held = torch.cuda.memory_allocated(device)
        receiver.free_memory()
        assert torch.cuda.memory_allocated(device) <= held - size, (device, size)


def trained(weights: torch.Tensor) -> torch.Tensor:
    """Change a few elements."""
    return torch.where(weights.abs() > 1e3, -weights, weights)


def main(model: str, engines: int, *, is_colocated: bool) -> None:
    compute_everywhere()
    inherit_streams()
    hf, grid, layout = CASES[model]
    Placement(0 if is_colocated else grid.world, layout.ranks_per_engine, is_colocated).install()
    tensors = push_world.draw(hf, 1)
    options = {"engines": engines, "table": push_world.plain_table}
    world = push_world.World(hf, grid, layout, tensors, transport="nccl", seconds=100, **options)
    for number in (1, 2, 3):
        world.push(number)
        assert_delivered(world, tensors, number)
        if is_colocated:
            assert_memory_returns(world)
        for held in world.held:
            for parameter in {id(p): p for pieces in held.values() for p, _ in pieces}.values():
                parameter.copy_(trained(parameter))
        tensors = {name: trained(tensor) for name, tensor in tensors.items()}
    world.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), is_colocated="colocated" in sys.argv)
