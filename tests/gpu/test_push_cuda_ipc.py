"""Weights written by another process straight into this one's GPU memory."""

import multiprocessing

import torch
from torch.distributed import TCPStore

from megatron_r1.push.rendezvous import EngineRendezvous, TrainerRendezvous
from megatron_r1.push.slots import Slot, SlotTable, TensorChunk, slot_view
from megatron_r1.push.transports import receiver_class, sender_class

ENGINE = "ipc.0"
SLOTS = [
    Slot("vector", 0, 700, 0, 1, 0, 4, "float32"),
    Slot("matrix", 0, 512, 0, 300, 4096, 640, "bfloat16"),
]
TABLE = SlotTable(4096 + 512 * 640, SLOTS)
DELIVERIES = [TensorChunk(0, 0, 700, 0, 1), TensorChunk(1, 0, 512, 0, 300)]


def sources(push):
    generator = torch.Generator().manual_seed(push)
    return [torch.randn(700, 1, generator=generator), torch.randn(512, 300, generator=generator)]


def send(port, pushes, done):
    rendezvous = TrainerRendezvous(TCPStore("127.0.0.1", port, is_master=False), ENGINE, 60)
    (info,) = rendezvous.read_receivers(1)
    sender = sender_class("cuda_ipc")(rendezvous, 0, 0, info)
    sender.plan(DELIVERIES)
    rendezvous.publish_plan(0, [[(0, DELIVERIES)]])
    rendezvous.publish_prepared(1, 1)
    sender.connect()
    for push in iter(pushes.get, None):
        sender.send(push, [part.cuda() for part in sources(push)])
    done.wait(60)  # its handles must outlive what reads through them
    sender.close()


def test_what_another_process_writes_is_here_and_its_checksums_agree():
    spawn = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pushes, done = spawn.Queue(), spawn.Event()
    other = spawn.Process(target=send, args=(store.port, pushes, done), daemon=True)
    other.start()
    rendezvous = EngineRendezvous(TCPStore("127.0.0.1", store.port, is_master=False), ENGINE, 60)
    receiver = receiver_class("cuda_ipc")(rendezvous, 0, TABLE)
    try:
        for push in (1, 2):
            pushes.put(push)
            receiver.received_chunks.wait(push, 60)
            assert receiver.memory.is_cuda
            for slot, sent in zip(SLOTS, sources(push), strict=True):
                received = slot_view(receiver.memory, slot).cpu()
                assert torch.equal(received, sent.to(received.dtype)), slot.name
    finally:
        pushes.put(None)
        done.set()
        other.join(60)
        receiver.close()
