"""A fleet and a bridge whose engines load windows while others are sent, and do not get all."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megatron_r1.engine.errors import PushIncomplete
from megatron_r1.errors import TrainerLost
from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.rollout_fleet import RolloutFleet
from megatron_r1.weight_bridge.bridge import WeightBridge


class Server:
    is_lost = False

    def stop(self): ...

    def describe_end(self):
        return "killed"


class Client:
    """failures: of the next swaps. swapped: the versions of its swaps."""

    def __init__(self):
        self.failures, self.swapped = [], []

    async def swap_weights(self, update, version, resume=True):
        self.swapped.append(version)
        if self.failures:
            raise self.failures.pop()

    async def wake(self, tag): ...

    async def resume(self): ...

    async def close(self): ...


class Links:
    """The links to sets of these engines. sends: the engines of each send. outcomes: of each, what
    is to be repeated, or an error; after them nothing."""

    def __init__(self, *sets):
        self.sets = [SimpleNamespace(engines=engines) for engines in sets]
        self.connector = SimpleNamespace(
            settings=SimpleNamespace(timeout_seconds=5), num_windows=2, connect_seconds=5
        )
        self.num_links = self.num_bytes = 0
        self.sends, self.outcomes = [], []

    def engines_to_regroup(self, engines):
        return []

    async def form_sets(self, engines, on_lost, *, resume): ...

    def reporting_deaths(self):
        return nullcontext()

    async def send(self, push, engines, on_lost):
        self.sends.append(list(engines))
        outcome = self.outcomes.pop(0) if self.outcomes else []
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a bridge to engines 0 and 1, which form a set, and 2, alone; they hold version 1."""
    monkeypatch.setattr("megatron_r1.fleet.engine.LAST_WORDS_SECONDS", 0.0)

    async def make():
        fleet = RolloutFleet(3, tmp_path, max_restarts=9)
        engines = [Engine(index, Server(), Client(), is_up=True) for index in range(3)]
        fleet.engines[:] = engines
        fleet.members.begin()
        fleet.version = 1

        async def start_replacement(dead):
            await asyncio.Event().wait()

        fleet.replacement.start_replacement = start_replacement
        links = Links(engines[:2], engines[2:])
        bridge = WeightBridge(fleet, links)
        await bridge._settled.acquire()
        return bridge, fleet, links, [engine.client for engine in engines]

    return make


def run(story):
    asyncio.run(story())


@pytest.mark.parametrize("sleeps", [False, True])
def test_a_push_ends_where_all_engines_that_did_not_get_it_are_lost(make, sleeps):
    """Otherwise the fleet stays asleep, and the next push leaves out the engines that got it."""

    async def story():
        bridge, fleet, _, clients = await make()
        if sleeps:
            fleet.awake.clear()
        clients[0].failures = [PushIncomplete("late", 500)]
        await bridge.push(2)
        assert [engine.is_up for engine in fleet.engines] == [False, True, True]
        assert fleet.version == 2 and fleet.awake.is_set()
        await bridge.push(3)
        assert [client.swapped for client in clients] == [[2], [2, 3], [2, 3]]
        await fleet.close()

    run(story)


def test_only_engines_that_did_not_get_a_push_load_it_again(make):
    async def story():
        bridge, fleet, links, clients = await make()
        links.outcomes = [fleet.engines[:1]]
        clients[0].failures = [PushIncomplete("late", 500)]
        await bridge.push(2)
        assert fleet.version == 2 and all(engine.is_up for engine in fleet.engines)
        assert [client.swapped for client in clients] == [[2, 2], [2], [2]]
        assert links.sends == [fleet.engines, fleet.engines[:1]]
        await fleet.close()

    run(story)


def test_engines_load_the_push_of_a_trainer_that_started_again(make):
    """Those, too, that had loaded the one amid which it was lost."""

    async def story():
        bridge, fleet, links, clients = await make()
        links.outcomes = [fleet.engines[:1], TrainerLost("killed")]
        clients[0].failures = [PushIncomplete("late", 500)]
        with pytest.raises(TrainerLost):
            await bridge.push(2)
        fleet.version = -1
        await bridge.push(2)
        assert [client.swapped[-1:] for client in clients] == [[2]] * 3
        assert len(clients[1].swapped) == len(clients[2].swapped) == 2
        await fleet.close()

    run(story)
