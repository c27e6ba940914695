"""Which engines hang."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import ConnectionBroken, EngineError


@pytest.mark.parametrize(
    ("answer", "is_dead", "is_hanging"),
    [
        (None, False, False),
        (EngineError("busy", 503), False, False),
        (ConnectionBroken("refused"), False, True),
        (ConnectionBroken("refused"), True, False),
    ],
)
def test_an_engine_hangs_that_lives_and_gives_no_answer(answer, is_dead, is_hanging):
    async def is_sleeping():
        if answer is not None:
            raise answer

    async def run():
        engine = Engine(0, SimpleNamespace(), SimpleNamespace(is_sleeping=is_sleeping))
        if is_dead:
            engine.death_noticed.set()
        return await engine.is_hanging(0.01)

    assert asyncio.run(run()) == is_hanging
