"""All ranks of a sharded trainer and of equal engines, in threads of one process."""

from functools import partial
from queue import SimpleQueue

import torch
from torch.distributed import TCPStore

from megatron_r1.models.weights import hf_tensors
from megatron_r1.models.weights.formats.published_layout import is_quantized, scale_name
from megatron_r1.models.weights.layout import stage_shards
from megatron_r1.push.control_messages import SentWeights
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.regions import scale_region
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.sender import WeightSender, run_in_threads
from megatron_r1.push.slots import Slot, SlotTable, slot_view
from megatron_r1.push.transports import receiver_class
from tests.harness.waiting import PATIENT
from tools.bench.push.small_model import rank_tensors


def draw(hf_config, seed, *, with_mtp=False):
    """Return a model's weights in bf16; the blocks of matrices differ in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, _) in hf_tensors(hf_config, with_mtp=with_mtp).items():
        spread = torch.logspace(-4, 3, shape[-1]) if len(shape) == 2 else 1.0
        tensors[name] = (torch.randn(shape, generator=generator) * spread).bfloat16()
    return tensors


def table_of(hf_config, engine, rank):
    """Return an engine rank's table in FP8: rows with gaps, one tensor after another."""
    slots, end = [], 0
    for tensor, region in PredictedSharding(hf_config, engine).regions_of(engine.coordinate(rank)):
        items = [(tensor.name, region, "bfloat16")]
        if is_quantized(tensor.name):
            items = [(tensor.name, region, "float8_e4m3fn")]
            items.append((scale_name(tensor.name), scale_region(region), "float32"))
        for name, at, dtype in items:
            size = getattr(torch, dtype).itemsize
            pitch = (at.right - at.left + 3) * size
            slots.append(Slot(name, at.top, at.bottom, at.left, at.right, end, pitch, dtype))
            end += -(-(at.bottom - at.top) * pitch // 64) * 64
    return SlotTable(end, slots)


class Shared:
    """Bytes that rank 0 passes on to all, one after another."""

    def __init__(self, ranks):
        self.queues = [SimpleQueue() for _ in range(ranks)]

    def of(self, rank):
        def share(value):
            if rank == 0:
                for queue in self.queues:
                    queue.put(value)
            return self.queues[rank].get()

        return share


class World:
    """All ranks of a trainer and of one set of engines, in threads.

    Args:
        drafts: whether engines draft with MTP layers.
        adapters: the weight table of the adapters, where these alone are pushed.

    Attributes:
        receivers: the receiver of each (engine, rank).
        answers: the trainer ranks' answers to `connect`."""

    def __init__(
        self,
        hf_config,
        grid,
        engine,
        tensors,
        *,
        engines=1,
        transport="gloo",
        seconds=PATIENT,
        table=table_of,
        drafts=False,
        adapters=None,
    ):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.name = f"set.{self.store.port}"
        shared = Shared(grid.world_size)
        self.held = [
            rank_tensors(hf_config, grid, rank, tensors, with_mtp=drafts, weight_table=adapters)
            for rank in range(grid.world_size)
        ]
        mtp = {"stages": stage_shards(hf_config, grid.pipeline, with_mtp=drafts), "drafts": drafts}
        mtp["adapters"] = adapters
        self.senders = [
            WeightSender(hf_config, grid, held, self.client(), shared.of(rank), rank=rank, **mtp)
            for rank, held in enumerate(self.held)
        ]
        ranks = range(engine.ranks_per_engine)
        places = [(member, rank) for member in range(engines) for rank in ranks]
        tables = {place: table(hf_config, engine, place[1]) for place in places}

        def receiver(member, rank):
            sizes = {"member": member, "num_members": engines}
            met = EngineRendezvous(self.client(), self.name, PATIENT, seconds, **sizes)
            return receiver_class(transport)(met, rank, tables[member, rank])

        def connect(sender):
            sets = [(self.name, engines)]
            return sender.connect(sets, engine, transport, PATIENT, seconds)

        ends = run_in_threads([partial(receiver, *at) for at in places] + self.each(connect))
        self.receivers = dict(zip(places, ends[: len(places)], strict=True))
        self.answers = ends[len(places) :]

    def each(self, call, ranks=None):
        return [
            partial(call, sender)
            for rank, sender in enumerate(self.senders)
            if ranks is None or rank in ranks
        ]

    def client(self):
        return TCPStore("127.0.0.1", self.store.port, is_master=False)

    def send(self, number, ranks=None):
        return run_in_threads(self.each(lambda sender: sender.send(number, [self.name]), ranks))

    def push(self, number):
        assert all(answer == SentWeights({}) for answer in self.send(number))
        for receiver in self.receivers.values():
            receiver.received_chunks.wait(number, PATIENT)

    def close(self):
        for sender in self.senders:
            sender.disconnect(self.name)
        for receiver in self.receivers.values():
            receiver.close()


def plain_table(hf_config, engine, rank, *, drafts=False):
    """Return an engine rank's table in bfloat16, one tensor after another."""
    slots, end = [], 0
    for tensor, at in PredictedSharding(hf_config, engine, drafts=drafts).regions_of(
        engine.coordinate(rank)
    ):
        place = at.top, at.bottom, at.left, at.right
        slots.append(Slot(tensor.name, *place, end, 2 * (at.right - at.left), "bfloat16"))
        end += 2 * at.num_elements
    return SlotTable(-(-end // 64) * 64, slots)


def wrong_slots(world, tensors, number):
    wrong = []
    for place, receiver in world.receivers.items():
        buffer = receiver.table.buffer(receiver.memory, number)
        for slot in receiver.table.slots:
            whole = tensors[slot.name]
            whole = whole if whole.dim() > 1 else whole[:, None]
            expected = whole[slot.top : slot.bottom, slot.left : slot.right]
            if not torch.equal(slot_view(buffer, slot), expected.bfloat16()):
                wrong.append((place, slot.name))
    return wrong
