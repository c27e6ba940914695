"""Sets of engines that die, leave and join while a pusher pushes: the controller's part, trainer
ranks and engine ranks, with clients in the place of vLLM's servers. Oracle: plain slicing."""

import asyncio
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from small_fleet import SmallFleet
from torch.distributed import TCPStore
from waiting import PATIENT

from megatron_r1.config.push import PushConfig
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import ConnectionBroken, EngineDied, EngineLacksPush
from megatron_r1.push.control_messages import IncompletePush, OpenedPush
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.rendezvous import EngineRendezvous
from megatron_r1.push.sender import WeightSender, run_in_threads
from megatron_r1.push.transports import gloo, receiver_class
from megatron_r1.push.transports.payloads import LinkPayload
from megatron_r1.trainer.operations import PushOperations
from tests.unit.push.push_models import DEEPSEEK
from tests.unit.push.push_world import Shared, draw, plain_table, wrong_slots
from tools.bench.push.small_model import rank_tensors

GRID, LAYOUT = TrainerGrid(4, pipeline=2, expert=2), EngineLayout(tensor_parallel=2)


class Trainer:
    """Trainer ranks in threads."""

    def __init__(self, tensors):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared, self.senders = Shared(GRID.world_size), []
        for rank in range(GRID.world_size):
            held = rank_tensors(DEEPSEEK, GRID, rank, tensors)
            client = TCPStore("127.0.0.1", self.store.port, is_master=False)
            sender = WeightSender(DEEPSEEK, GRID, held, client, shared.of(rank), rank=rank)
            self.senders.append(sender)

    async def call_all(self, operation, on_start=None, **arguments):
        if operation == PushOperations.open_push:
            return [OpenedPush(("127.0.0.1", self.store.port))]
        if on_start:
            on_start()
        name = {"connect_sets": "connect", "send_weights": "send"}[operation.__name__]
        calls = [partial(getattr(sender, name), **arguments) for sender in self.senders]
        return await asyncio.to_thread(run_in_threads, calls)

    def close(self):
        for sender in self.senders:
            for name in list(sender._sets):
                sender.disconnect(name)


class Client:
    """An engine of two ranks, which receive in threads of this process. version: of the weights
    that it has loaded."""

    def __init__(self):
        self.receivers, self.is_dead = [], False
        self.num_connections = self.num_reused = 0

    async def init_weight_transfer(self, info, resume):
        await asyncio.to_thread(self._connect, info)

    def _connect(self, info):
        self._refuse_if_dead()
        before, self.receivers = self.receivers, []
        for receiver in before:
            receiver.close()

        def receiver(rank):
            table = plain_table(DEEPSEEK, LAYOUT, rank)
            memory = before[rank].reusable_memory(table) if before else None
            self.num_reused += memory is not None
            store = TCPStore(*info.store, is_master=False)
            seconds = info.timeout_seconds, info.push_timeout_seconds
            place = {"member": info.member_index, "num_members": info.num_members}
            met = EngineRendezvous(store, info.name, *seconds, **place)
            return receiver_class("gloo")(met, rank, table, memory)

        self.receivers = run_in_threads([partial(receiver, rank) for rank in range(2)])
        self.num_connections += 1

    async def swap_weights(self, update, version, resume=True):
        await asyncio.to_thread(self._swap, update.push_number)

    def _swap(self, push):
        def load(rank, receiver):
            self._refuse_if_dead()
            receiver.received_chunks.wait(push, PATIENT)
            wrong = wrong_slots(self._only(rank), self.tensors, push)
            assert wrong == [], wrong

        try:
            run_in_threads([partial(load, *item) for item in enumerate(self.receivers)])
        except IncompletePush as error:
            self._refuse_if_dead()
            raise EngineLacksPush(str(error), 500) from error

    def _only(self, rank):
        return SimpleNamespace(receivers={rank: self.receivers[rank]})

    def _refuse_if_dead(self):
        if self.is_dead:
            raise ConnectionBroken("cut")

    def die(self):
        self.is_dead = True
        for receiver in self.receivers:
            receiver.received_chunks.fail(
                ConnectionBroken("cut")
            )  # the death ends the engine's own waits
            receiver.close()


class Fleet(SmallFleet):
    async def swap_weights(self, update, version):
        """As `EngineFleet.swap_weights`."""
        engines = [engine for engine in self.engines if engine.is_up]
        calls = [engine.client.swap_weights(update, version) for engine in engines]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, (EngineLacksPush, ConnectionBroken)):
                self.replace(engine, EngineDied(str(outcome)))
            elif outcome is not None:
                raise outcome
            else:
                engine.client.version = version


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr("megatron_r1.engines.fleet.engine.DEATH_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(gloo, "BUCKET_BYTES", 3000)
    tensors, clients, trainers = draw(DEEPSEEK, 1), [], []

    def engine(index, is_up=True):
        client = Client()
        client.tensors, client.version = tensors, -1
        clients.append(client)
        return Engine(index, SimpleNamespace(describe_end=lambda: "?"), client, is_up=is_up)

    def make(count):
        trainers.append(Trainer(tensors))
        fleet = Fleet(engine(index) for index in range(count))
        settings = PushConfig(transport="gloo", timeout_seconds=PATIENT)
        links = EngineLinks(trainers[-1], settings, [], LAYOUT, notify=lambda line: None)
        return fleet, WeightPusher(fleet, links), engine

    yield make
    for trainer in trainers:
        trainer.close()
    for client in clients:
        for receiver in client.receivers:
            receiver.close()


def run(story):
    asyncio.run(story)


async def push(pusher, version):
    async with pusher.updating_weights():
        if version == 1:
            await pusher.open()
        await pusher.push(version)


def test_an_engine_that_dies_between_pushes_costs_the_others_a_new_set(make):
    async def story():
        fleet, pusher, engine = make(3)
        await push(pusher, 1)
        clients = [engine.client for engine in fleet.engines]
        clients[1].die()
        await push(pusher, 2)  # not noticed yet
        assert [index for index, _ in fleet.lost] == [1]
        assert [client.version for client in clients] == [2, 1, 2]
        assert [client.num_connections for client in clients] == [2, 1, 2]
        new = engine(1, is_up=False)
        async with pusher.send_weights(new):
            assert new.client.version == -1 and new.client.num_connections == 1
            fleet.engines[1], new.is_up = new, True
        await push(pusher, 3)
        assert [len(one.engines) for one in pusher.links.sets] == [3]
        assert [e.client.version for e in fleet.engines] == [3, 3, 3]
        of_clients = Counter(
            sender
            for client in [engine.client for engine in fleet.engines]
            for receiver in client.receivers
            for sender in receiver.senders
        )
        assert pusher.links.num_links == max(of_clients.values())
        assert clients[0].num_reused + clients[2].num_reused >= 4, "memory was allocated again"

    run(story())


def test_an_engine_that_dies_amid_a_push_costs_the_others_a_repeated_one(make, monkeypatch):
    async def story():
        fleet, pusher, _ = make(3)
        await push(pusher, 1)
        clients, count = [engine.client for engine in fleet.engines], []
        packed = LinkPayload.pack

        def dying(*arguments):
            count.append(1)
            if len(count) == 5:
                fleet.engines[2].client.die()
                loop.call_soon_threadsafe(fleet.engines[2].death_noticed.set)
            return packed(*arguments)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(LinkPayload, "pack", dying)
        await push(pusher, 2)
        assert {index for index, _ in fleet.lost} == {2}
        assert [client.version for client in clients[:2]] == [2, 2]
        await push(pusher, 3)
        assert [client.version for client in clients[:2]] == [3, 3]
        assert clients[0].num_connections == 2

    run(story())


def test_an_engine_that_has_left_is_not_waited_for(make):
    async def story():
        fleet, pusher, _ = make(3)
        await push(pusher, 1)
        left = fleet.engines.pop(0)
        left.client.die()
        await push(pusher, 2)
        assert fleet.lost == []
        assert [e.client.version for e in fleet.engines] == [2, 2]

    run(story())
