"""How often an engine that does not come back is started again."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.engines.fleet import engine_replacer
from megatron_r1.engines.fleet.engine_replacer import EngineReplacer
from megatron_r1.engines.server.errors import EngineDied, EngineError, WeightsUnavailable


class OneEngine:
    """The state of a fleet of one engine, and why it failed. For the first `num_without_weights`
    starts the trainer has no weights."""

    def __init__(self, num_without_weights=0):
        self.num_without_weights = num_without_weights
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
        if self.starts <= self.num_without_weights:
            raise WeightsUnavailable(f"attempt {self.starts}")
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


def test_starts_without_weights_are_further_and_further_apart(monkeypatch):
    state, pauses = OneEngine(num_without_weights=9), []

    async def sleep(seconds):
        pauses.append(seconds)

    async def run():
        replacement = EngineReplacer(state, state.start, 1, 60.0)
        replacement.replace(state.engine, EngineDied("it ended"))
        await asyncio.gather(*replacement.tasks)

    monkeypatch.setattr(engine_replacer.asyncio, "sleep", sleep)
    asyncio.run(run())
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert str(state.failure) == "attempt 10"


def test_a_closed_fleet_starts_no_engine_after_the_pause(monkeypatch):
    state, is_paused = OneEngine(num_without_weights=3), asyncio.Event()

    async def sleep(seconds):
        is_paused.set()
        await asyncio.Event().wait()

    async def run():
        replacement = EngineReplacer(state, state.start, 1, 60.0)
        replacement.replace(state.engine, EngineDied("it ended"))
        [replacing] = replacement.tasks
        pausing = asyncio.create_task(is_paused.wait())
        await asyncio.wait({replacing, pausing}, return_when=asyncio.FIRST_COMPLETED)
        await replacement.close()
        return replacing.cancelled()

    monkeypatch.setattr(engine_replacer.asyncio, "sleep", sleep)
    assert asyncio.run(run()) and state.starts == 1
