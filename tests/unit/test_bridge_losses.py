"""What a bridge says when its trainer is lost while an engine is being brought the weights."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.config.push import PushConfig
from megatron_r1.rl.weight_bridge import WeightBridge
from megatron_r1.rollout.client import EngineClient
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.errors import EngineError
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

        async def push(update, version): ...

        fleet = SimpleNamespace(engines=[], push=push)
        bridge = WeightBridge(trainer, fleet, PushConfig(), [], {})
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
