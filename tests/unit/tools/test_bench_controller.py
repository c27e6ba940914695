"""A rollout's samples held in one event loop: what the bench of the controller names."""

import asyncio
import time

import pytest

from tools.bench.controller.rollout import EventLoopMonitor, measure, missed_aims
from tools.bench.controller.synthetic import GROUP
from tools.bench.host import run_in_process


@pytest.mark.more
def test_a_small_rollout_arrives_whole():
    """`measure` raises where the ranks get other samples than the engines have sent."""
    found = run_in_process(measure, 4, 200, 4, 2, False, 0.0)
    assert found["response tokens"] == 4 * GROUP * 200
    assert found["seconds"]["rollout"] > 0 and found["accuracy"] == 0.5


def test_a_loop_that_parses_samples_itself_is_named_with_its_phase():
    async def rollout():
        async with EventLoopMonitor() as watch:
            watch.phase = "rollout"
            await asyncio.sleep(0.01)
            time.sleep(0.25)  # a group of 16 x 30,000 tokens as JSON took 0.28 s
            await asyncio.sleep(0.01)
        return watch

    watch = asyncio.run(rollout())
    assert watch.late["rollout"] >= 1 and watch.longest["rollout"] > 0.2
    blocked = {phase: 1e3 * seconds for phase, seconds in watch.longest.items()}
    (sentence,) = missed_aims(size(blocked))
    assert "rollout" in sentence and "100" in sentence


def test_a_rollout_that_is_held_and_read_late_is_named():
    assert missed_aims(size({"rollout": 73.0, "training": 84.0})) == []
    assert missed_aims(size({"rollout": 73.0}, added=144.0, held=37e9)) == [
        "144.0 s added beyond sampling, at most 20 wanted",
        "37.0 GB held, at most 8 wanted",
    ]


def size(blocked: dict[str, float], added: float = 5.9, held: float = 7.7e9) -> dict:
    return {
        "seconds": {"added": added},
        "longest block, ms": blocked,
        "peak bytes": {"RssAnon": held},
    }
