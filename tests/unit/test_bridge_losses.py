"""What a bridge says when its trainer is lost while an engine is being brought the weights."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megatron_r1.config.push import PushConfig
from megatron_r1.rl.weight_bridge import WeightBridge
from megatron_r1.rollout.client import EngineClient
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.errors import ConnectionBroken, EngineDied, EngineError
from megatron_r1.training.client import TrainerLost


class TrainerThatIsLost:
    """While it connects an engine; `is_asked` is set by then, and `goes` lets it happen."""

    def __init__(self):
        self.is_asked, self.goes = asyncio.Event(), asyncio.Event()

    async def call_all(self, operation, **arguments):
        if operation == "connect_engine":
            self.is_asked.set()
            await self.goes.wait()
            raise TrainerLost("trainer rank 0 was killed by signal 9")
        return [{"store": ["127.0.0.1", 1], "problems": {}}]


@pytest.mark.parametrize("is_closed_first", [True, False])
def test_an_engine_that_is_being_fed_when_the_trainer_is_lost_is_told_so(is_closed_first):
    """By an error after which it is started again, whatever comes first: the loss, or the end of
    the session that noticed it."""

    async def story():
        trainer = TrainerThatIsLost()
        bridge = WeightBridge(trainer, SmallFleet(), PushConfig(), [], {})
        await bridge.open()
        await bridge.push(1)
        engine = Engine(0, SimpleNamespace(), EngineClient("http://127.0.0.1:9"))

        async def feed():
            async with bridge.feed(engine):
                pytest.fail("it was fed")

        feeding, waiting = asyncio.create_task(feed()), asyncio.create_task(feed())
        await trainer.is_asked.wait()
        if is_closed_first:
            bridge.close()
        trainer.goes.set()
        with pytest.raises(EngineError, match="engine-0: no weights for it: trainer rank 0 was"):
            await feeding
        bridge.close()
        with pytest.raises(EngineError, match="engine-0: "):
            await waiting
        await engine.client.close()

    asyncio.run(asyncio.wait_for(story(), 20))


class SmallTrainer:
    """Whose rank 0 loses the engines in `loses`. `told`: what it was asked, in order."""

    def __init__(self, loses=()):
        self.loses, self.told = loses, []

    async def call_all(self, operation, **arguments):
        self.told.append((operation, arguments))
        problems = {str(index): "Connection reset" for index in self.loses}
        return [{"store": ["127.0.0.1", 1], "problems": problems, "num_windows": 1}]

    async def call(self, operation, **arguments):
        pytest.fail("it was asked for a proof")


class SmallFleet:
    engines = ()

    def __init__(self):
        self.lost = []

    async def push(self, update, version): ...

    def patient(self, seconds):
        return nullcontext()

    def lose(self, engine, death):
        self.lost.append((engine.index, str(death)))


class SmallClient:
    """generate: raises `fault`, as a probe whose connection breaks does."""

    def __init__(self, fault=None):
        self.fault = fault

    async def init_weight_transfer(self, init): ...
    async def swap_weights(self, update, version): ...

    async def generate(self, *arguments, **settings):
        raise self.fault


def feed(trainer, client, probes=()):
    """What comes of bringing a new engine the weights."""

    async def story():
        bridge = WeightBridge(trainer, SmallFleet(), PushConfig(), [], {}, probes)
        await bridge.open()
        await bridge.push(1)
        engine = Engine(3, SimpleNamespace(describe_end=lambda: "?"), client, is_up=False)
        async with bridge.feed(engine):
            pass

    asyncio.run(asyncio.wait_for(story(), 20))


def test_an_engine_joins_with_a_proof_or_not_at_all(monkeypatch):
    monkeypatch.setattr("megatron_r1.rollout.engine.LAST_WORDS_SECONDS", 0.0)
    feed(SmallTrainer(), SmallClient())
    broken = SmallClient(ConnectionBroken("cut"))
    with pytest.raises(EngineDied, match="engine-3 was lost: cut"):
        feed(SmallTrainer(), broken, probes=[[1, 2]])


def test_an_engine_that_the_trainer_could_not_bring_anything_does_not_join():
    with pytest.raises(EngineDied, match="engine-3: trainer rank 0 lost it: Connection reset"):
        feed(SmallTrainer(loses=[3]), SmallClient())


def test_the_trainer_forgets_engines_that_are_gone():
    async def story():
        trainer, fleet = SmallTrainer(), SmallFleet()
        fleet.engines = [
            Engine(index, SimpleNamespace(), SmallClient(), is_up=True) for index in (0, 1)
        ]
        bridge = WeightBridge(trainer, fleet, PushConfig(), [], {})
        await bridge.open()
        await bridge.push(1)
        del fleet.engines[0]
        for version in (2, 3):
            await bridge.hold()
            await bridge.push(version)
        return [asked["gone"] for operation, asked in trainer.told if operation == "send_weights"]

    assert asyncio.run(story()) == [[], [0], []]
