"""All ranks of a sharded trainer and of an engine in FP8, in threads of one process."""

import threading

import torch
from torch.distributed import TCPStore
from weight_shards import shard

from megatron_r1.weight_sync.plan.fp8_blocks import scale_region
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.receive import Slot, SlotTable
from megatron_r1.weight_sync.receive.rendezvous import Rendezvous
from megatron_r1.weight_sync.send.sender import WeightSender
from megatron_r1.weight_sync.transports import receiver_class
from megatron_r1.weights import hf_tensors, layout
from megatron_r1.weights.stored.fp8 import is_quantised, scale_name


def draw(hf, seed):
    """Return a model's weights in bf16; the blocks of matrices differ in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, _) in hf_tensors(hf, with_mtp=False).items():
        spread = torch.logspace(-4, 3, shape[-1]) if len(shape) == 2 else 1.0
        tensors[name] = (torch.randn(shape, generator=generator) * spread).bfloat16()
    return tensors


def table_of(hf, engine, rank):
    """Return an engine rank's table: rows with gaps, one tensor after another."""
    slots, end = [], 0
    for tensor, region in PredictedLayout(hf, engine).needed(engine.coordinate(rank)):
        items = [(tensor.name, region, "bfloat16")]
        if is_quantised(tensor.name):
            items = [(tensor.name, region, "float8_e4m3fn")]
            items.append((scale_name(tensor.name), scale_region(region), "float32"))
        for name, at, dtype in items:
            size = getattr(torch, dtype).itemsize
            pitch = (at.right - at.left + 3) * size
            slots.append(Slot(name, at.top, at.bottom, at.left, at.right, end, pitch, dtype))
            end += -(-(at.bottom - at.top) * pitch // 64) * 64
    return SlotTable(end, slots)


def held_by(hf, grid, rank, tensors):
    """Return a trainer rank's parameters and pieces by HF name."""
    expert_tensor, expert = grid.expert_coordinate(rank)
    at = shard(
        hf,
        tp=(grid.tensor_rank(rank), grid.tensor),
        pp=(grid.stage(rank), grid.pipeline),
        ep=(expert, grid.expert),
        etp=(expert_tensor, grid.expert_tensor),
    )
    held = {}
    for entry in layout(hf, at).values():
        parameter = torch.zeros(entry.shape, dtype=torch.bfloat16)
        for piece in entry.pieces:
            whole = tensors[piece.hf_name].narrow(piece.dim, piece.hf_start, piece.length)
            parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(whole)
            held.setdefault(piece.hf_name, []).append((parameter, piece))
    return held


def run_all(calls):
    """Run each call in a thread; return their results, or raise the first error."""
    results, errors = [None] * len(calls), []

    def run(index, call):
        try:
            results[index] = call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class World:
    """All ranks of a trainer and of one engine, in threads."""

    def __init__(self, hf, grid, engine, transport, tensors, full_every=1):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.held = [held_by(hf, grid, rank, tensors) for rank in range(grid.world)]
        self.senders = [
            WeightSender(hf, grid, held, self.client(), rank=rank)
            for rank, held in enumerate(self.held)
        ]
        tables = [table_of(hf, engine, rank) for rank in range(engine.ranks_per_engine)]
        name = f"fp8.{self.store.port}"
        shape = {"tensor": engine.tensor, "data": engine.data, "pipeline": engine.pipeline}
        shape["expert_parallel"] = engine.expert_parallel

        def receiver(rank):
            rendezvous = Rendezvous(self.client(), name, 20)
            return receiver_class(transport)(rendezvous, rank, tables[rank])

        ends = run_all(
            [lambda rank=rank: receiver(rank) for rank in range(len(tables))]
            + [
                lambda sender=s: sender.connect(0, name, shape, transport, 20, full_every)
                for s in self.senders
            ]
        )
        self.receivers, self.answers = ends[: len(tables)], ends[len(tables) :]

    def client(self):
        return TCPStore("127.0.0.1", self.store.port, is_master=False)

    def push(self, number):
        answers = run_all([lambda s=s: s.send(number, [0]) for s in self.senders])
        assert all(answer == {"problems": {}} for answer in answers)
        for receiver in self.receivers:
            receiver.buffer.wait(number, 0, 20)

    def close(self):
        for sender in self.senders:
            sender.disconnect(0)
        for receiver in self.receivers:
            receiver.close()
