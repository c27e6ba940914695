"""What a run does with engines that compute something else than the trainer."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from megatron_r1.config import Config
from megatron_r1.controller.session import PolicyEngines, Session
from megatron_r1.controller.trainer_calls.recorder import RunState
from megatron_r1.engines.server.errors import EngineError


class Pool:
    busy_seconds, num_workers, most_outstanding = 0.0, 1, 0

    def snapshot(self):
        return {}


class Engines:
    """Bridge, sampler, evaluation and recorder in one: notes what is done, and fails the probes."""

    def __init__(self):
        self.done: list[str] = []
        self.config, self.log = Config(), None
        self.collector = SimpleNamespace(pool=Pool(), fleet=None, teacher=None)

    @contextlib.asynccontextmanager
    async def updating(self):
        yield

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
    passes = SimpleNamespace(run_config=Config(), trainer=None, uses_reference=False)
    policy = PolicyEngines(None, engines, engines)
    session = Session(recorder, SimpleNamespace(requested=False), policy, passes, engines)

    async def story():
        await policy.push(0)
        if what != "begin":
            session.next_step()
            policy._taken = SimpleNamespace()
        await (policy.rollout(1) if what == "rollout" else getattr(session, what)())

    with pytest.raises(EngineError, match="differs"):
        asyncio.run(story())
    assert not {"take", "evaluate", "save"} & {*engines.done}
