import asyncio

import pytest

from megatron_r1.controller.rollouts.step_sampler import RolloutStream


class Engines:
    """Batches that end when they are told to; notes when each began."""

    def __init__(self):
        self.began: list[int] = []
        self.ends: dict[int, asyncio.Event] = {}

    async def sample(self, step: int) -> str:
        self.began.append(step)
        self.ends[step] = asyncio.Event()
        await self.ends[step].wait()
        return f"batch {step}"


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_batch_begins_when_the_policy_is_at_most_so_many_versions_behind(ahead):
    async def run():
        engines = Engines()
        stream = RolloutStream(engines.sample, first_step=3, last_step=6, staleness=ahead)
        for step in range(3, 7):
            stream.start_allowed_by(step - 1)  # what step - 1 has learned
            await settle()
            assert engines.began == list(range(3, min(6, step + ahead) + 1))
            engines.ends[step].set()
            assert await stream.get(step) == f"batch {step}"

    asyncio.run(run())


def test_batches_overlap_unless_they_must_not():
    async def began(one_at_a_time: bool) -> list[int]:
        engines = Engines()
        stream = RolloutStream(engines.sample, 1, 9, 2, one_at_a_time=one_at_a_time)
        stream.start_allowed_by(0)
        await settle()
        seen = list(engines.began)
        engines.ends[1].set()
        await settle()
        await stream.close()
        return [seen, engines.began]

    assert asyncio.run(began(False)) == [[1, 2, 3], [1, 2, 3]]
    assert asyncio.run(began(True)) == [[1], [1, 2]]


def test_a_failure_comes_with_its_own_batch():
    async def sample(step: int) -> int:
        if step == 2:
            raise RuntimeError("engine died")
        return step

    async def run():
        stream = RolloutStream(sample, 1, 3, 2)
        stream.start_allowed_by(0)
        await settle()
        assert await stream.get(1) == 1
        with pytest.raises(RuntimeError, match="engine died"):
            await stream.get(2)
        assert await stream.get(3) == 3

    asyncio.run(run())


def test_closing_cancels_what_runs():
    async def run():
        engines = Engines()
        stream = RolloutStream(engines.sample, 1, 3, 1)
        stream.start_allowed_by(0)
        await settle()
        await stream.close()
        assert len(asyncio.all_tasks()) == 1, "only this test is left"

    asyncio.run(run())


def test_a_batch_whose_policy_was_not_pushed_is_a_mistake():
    async def run():
        stream = RolloutStream(Engines().sample, 1, 3, 0)
        with pytest.raises(ValueError, match="step 1"):
            await stream.get(1)

    asyncio.run(run())
