"""All ranks of a sharded trainer and of several engines that form a set, in threads."""

import threading

from torch.distributed import TCPStore

from megatron_r1.weight_sync.receive.sets import MemberRendezvous
from megatron_r1.weight_sync.send.sender import WeightSender
from megatron_r1.weight_sync.send.set_sender import SetSender
from megatron_r1.weight_sync.transports.exchange import GlooExchangeReceiver
from tests.unit.weight_sync.push_world import held_by, run_all, table_of


class Shared:
    """Bytes that rank 0 passes on to all."""

    def __init__(self):
        self.given, self.value = threading.Event(), b""

    def __call__(self, value):
        if value is not None:
            self.value = value
            self.given.set()
        self.given.wait(20)
        return self.value


class SetWorld:
    def __init__(self, hf, grid, engine, engines, tensors, seconds=20, table=table_of):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        share, self.name = Shared(), "set.1"
        self.held = [held_by(hf, grid, rank, tensors) for rank in range(grid.world)]
        self.senders = [
            SetSender(WeightSender(hf, grid, held, self.client(), rank=rank), share)
            for rank, held in enumerate(self.held)
        ]
        shape = {"tensor": engine.tensor, "data": engine.data, "pipeline": engine.pipeline}
        shape["expert_parallel"] = engine.expert_parallel

        def receiver(member, rank):
            met = MemberRendezvous(self.client(), self.name, member, engines, 20, seconds)
            return GlooExchangeReceiver(met, rank, tables[member, rank])

        ranks = range(engine.ranks_per_engine)
        places = [(member, rank) for member in range(engines) for rank in ranks]
        tables = {place: table(hf, engine, place[1]) for place in places}
        ends = run_all(
            [lambda at=at: receiver(*at) for at in places]
            + [
                lambda sender=s: sender.connect(self.name, engines, shape, "gloo", 20, seconds)
                for s in self.senders
            ]
        )
        self.receivers = dict(zip(places, ends[: len(places)], strict=True))
        self.answers = ends[len(places) :]

    def client(self):
        return TCPStore("127.0.0.1", self.store.port, is_master=False)

    def send(self, number, ranks=None):
        senders = [s for rank, s in enumerate(self.senders) if ranks is None or rank in ranks]
        return run_all([lambda s=s: s.send(number) for s in senders])

    def close(self):
        for sender in self.senders:
            sender.close()
        for receiver in self.receivers.values():
            receiver.close()
