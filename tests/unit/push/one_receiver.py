"""One receiver and its senders in one process, and the slices that they exchange."""

import threading

import torch
from torch.distributed import TCPStore
from waiting import PATIENT

from megatron_r1.push.rendezvous import EngineRendezvous, TrainerRendezvous
from megatron_r1.push.slots import Slot, SlotTable, TensorChunk
from megatron_r1.push.transports import receiver_class, sender_class

TENSORS = {
    "norm": torch.arange(5, dtype=torch.float32)[:, None] + 0.5,
    "weight": torch.arange(12 * 8, dtype=torch.float32).reshape(12, 8) / 7,
    "experts": torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),
    "wide": torch.randn(6, 50, generator=torch.Generator().manual_seed(2)),
}
# An engine rank that needs all of a vector, rows 4-12 of a matrix, and half the columns of another
# one in bfloat16, with something else in the same rows; and whole stripes of a fourth.
SLOTS = [
    Slot("norm", 0, 5, 0, 1, 0, 4, "float32"),
    Slot("weight", 4, 12, 0, 8, 64, 32, "float32"),
    Slot("experts", 0, 6, 5, 10, 320, 32, "bfloat16"),
    Slot("wide", 0, 6, 10, 42, 512, 192, "float32"),
]
BY_TWO = {
    0: [
        TensorChunk(0, 0, 5, 0, 1),
        TensorChunk(1, 0, 3, 0, 8),
        TensorChunk(2, 0, 6, 3, 5),
        TensorChunk(3, 0, 4, 0, 32),
    ],
    1: [TensorChunk(1, 3, 8, 0, 8), TensorChunk(2, 0, 6, 0, 3), TensorChunk(3, 4, 6, 0, 32)],
}


def expected_values(slot: Slot) -> torch.Tensor:
    part = TENSORS[slot.name][slot.top : slot.bottom, slot.left : slot.right]
    return part.to(getattr(torch, slot.dtype))


def slices(table: SlotTable, chunks: list[TensorChunk]) -> list[torch.Tensor]:
    """Return the slices as the trainer has them: float32, not converted yet."""
    values = []
    for d in chunks:
        slot = table.slots[d.slot]
        whole = TENSORS[slot.name][slot.top : slot.bottom, slot.left : slot.right]
        values.append(whole[d.top : d.bottom, d.left : d.right])
    return values


class OneReceiver:
    """One receiver and its senders."""

    def __init__(self, transport, slots, chunks, num_bytes=2048, num_buffers=1):
        self.table = SlotTable(num_bytes, slots, num_buffers)
        self.chunks = chunks
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ends = {}

        def receive():
            rendezvous = EngineRendezvous(self.client(), f"test.{self.store.port}", PATIENT)
            ends["receiver"] = receiver_class(transport)(rendezvous, 0, self.table)

        def connect(sender):
            rendezvous = TrainerRendezvous(self.client(), f"test.{self.store.port}", PATIENT)
            (info,) = rendezvous.read_receivers(1)
            end = sender_class(transport)(rendezvous, sender, 0, info)
            end.plan(chunks[sender])
            rendezvous.publish_plan(0, [list(chunks.items())])
            rendezvous.publish_prepared(len(chunks), 1)
            rendezvous.wait_prepared()
            end.connect()
            ends[sender] = end

        threads = [threading.Thread(target=receive)]
        threads += [threading.Thread(target=connect, args=(sender,)) for sender in chunks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.receiver = ends.pop("receiver")
        self.senders = ends

    def client(self):
        return TCPStore("127.0.0.1", self.store.port, is_master=False)

    def send(self, push, senders=None):
        def run(sender, end):
            end.send(push, slices(self.table, self.chunks[sender]))

        threads = [
            threading.Thread(target=run, args=item)
            for item in self.senders.items()
            if senders is None or item[0] in senders
        ]
        for thread in threads:
            thread.start()
        return threads

    def close(self):
        for end in self.senders.values():
            end.close()
        self.receiver.close()
