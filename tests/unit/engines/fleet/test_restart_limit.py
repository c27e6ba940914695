"""How often an engine that does not come back is started again."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.engines.fleet.recovery import EngineReplacer
from megatron_r1.engines.server.errors import EngineDied, EngineError


class OneEngine:
    """The state of a fleet of one engine, and why it failed."""

    def __init__(self):
        server = SimpleNamespace(is_lost=False)
        self.engine = SimpleNamespace(name="engine-0", is_up=True, server=server, stop=self.stop)
        self.up, self.failure, self.starts = [self.engine], None, 0

    async def stop(self):
        pass

    def mark_down(self, engine):
        engine.is_up = False

    def notify(self, line):
        pass

    def fail(self, error):
        self.failure = error

    async def start(self, engine):
        self.starts += 1
        raise EngineError(f"attempt {self.starts}")


@pytest.mark.parametrize("most", [1, 3])
def test_the_fleet_fails_when_no_restart_is_left(most):
    state = OneEngine()

    async def run():
        replacement = EngineReplacer(state, state.start, most, 60.0)
        replacement.replace(state.engine, EngineDied("it ended"))
        await asyncio.gather(*replacement.tasks)

    asyncio.run(run())
    assert state.starts == most and str(state.failure) == f"attempt {most}"


def test_without_restarts_the_death_is_raised_at_once():
    state, death = OneEngine(), EngineDied("it ended")

    async def run():
        EngineReplacer(state, state.start, 0, 60.0).replace(state.engine, death)

    with pytest.raises(EngineDied):
        asyncio.run(run())
    assert state.starts == 0 and state.failure is death
