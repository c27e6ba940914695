"""What a run does with engines that compute something else than the trainer."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.config import Config
from megatron_r1.engine.errors import EngineError
from megatron_r1.rl.session import Session
from megatron_r1.trainer_client.recorder import RunState


class Pool:
    busy_seconds, num_workers, most_outstanding = 0.0, 1, 0

    def snapshot(self):
        return {}


class Engines:
    """Bridge, sampler, evaluation and recorder in one: notes what is done, and fails the probes."""

    def __init__(self):
        self.done: list[str] = []
        self.collector = SimpleNamespace(pool=Pool(), fleet=SimpleNamespace())

    async def hold(self): ...

    async def open(self): ...

    async def push(self, version):
        return {}

    async def proven(self):
        raise EngineError("differs")

    def pushed(self, version):
        self.done.append("pushed")

    def begin(self, step):
        self.done.append("begin")

    async def take(self, step):
        self.done.append("take")

    async def run(self, step):
        self.done.append("evaluate")

    async def save(self, trainer):
        self.done.append("save")


@pytest.mark.parametrize("what", ["rollout", "finish", "begin"])
def test_nothing_is_taken_evaluated_or_saved_of_weights_whose_probes_fail(what):
    engines = Engines()
    recorder = SimpleNamespace(
        state=RunState(), view=None, resumed=False, save=engines.save, load=None
    )
    passes = SimpleNamespace(
        run_config=Config(), trainer=None, bridge=engines, uses_reference=False
    )
    session = Session(recorder, SimpleNamespace(requested=False), engines, passes, engines)

    async def story():
        await session.push_weights()
        if what != "begin":
            session.next_step()
            session._taken = SimpleNamespace()
        await getattr(session, what)()

    with pytest.raises(EngineError, match="differs"):
        asyncio.run(story())
    assert not {"take", "evaluate", "save"} & {*engines.done}
