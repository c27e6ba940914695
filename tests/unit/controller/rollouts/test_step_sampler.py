import asyncio

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.controller.rollouts.dynamic_sampling import collect_dynamic_rollout
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.controller.rollouts.rollout_stream import RolloutStream
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response


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


PROMPTS = [make_prompt(f"question {i}", "math", str(i), {}) for i in range(20)]


def group(prompt, *rewards):
    response = Response([1], [0.0], [0], "stop")
    responses = [
        GradedResponse(response, "x", {"accuracy": r, "format": 1.0}, r, "") for r in rewards
    ]
    return Group(prompt, [1], responses)


def collected(num_groups: int, rounds: int, teaches) -> tuple[Rollout, list[int]]:
    """What is collected where only the prompts that `teaches` accepts differ within their group;
    and how many prompts each round drew."""
    drawn: list[int] = []

    def draw(n: int):
        start = sum(drawn)
        drawn.append(n)
        return PROMPTS[start : start + n]

    async def collect(prompts):
        groups = [group(p, 1.0, 0.0 if teaches(PROMPTS.index(p)) else 1.0) for p in prompts]
        return Rollout(groups, 2.0, 0.5)

    return asyncio.run(collect_dynamic_rollout(collect, draw, num_groups, rounds)), drawn


def test_groups_without_a_difference_are_drawn_again():
    rollout, drawn = collected(4, 5, lambda i: i % 2 == 0)
    assert drawn == [4, 2, 1], "questions 0-3, of which 0 and 2 teach; 4 and 5; 6"
    assert [PROMPTS.index(g.prompt) for g in rollout.groups] == [0, 2, 4, 6]
    assert [PROMPTS.index(g.prompt) for g in rollout.filtered_groups] == [1, 3, 5]
    assert rollout.rollout_seconds == 6.0 and rollout.reward_seconds == 1.5


def test_a_batch_keeps_its_size_when_the_rounds_are_over():
    rollout, drawn = collected(4, 2, lambda i: i == 0)
    assert drawn == [4, 3]
    assert [PROMPTS.index(g.prompt) for g in rollout.groups] == [0, 1, 2, 3]
    assert len(rollout.filtered_groups) == 3


def test_metrics_are_of_everything_that_was_sampled():
    rollout, _ = collected(2, 3, lambda i: i >= 2)
    metrics = rollout_metrics(rollout, policy_version=0)
    assert metrics["accuracy"] == 6 / 8, "two groups all right, two half right"
    assert metrics["groups/filtered"] == 2 and metrics["groups/zero_variance"] == 0.5


def test_stale_samples_need_an_importance_weight():
    with refused("rl.importance_cap", Cause.MISSING):
        parse_recipe({"rl": {"staleness": 1}})
    assert parse_recipe({"rl": {"staleness": 1, "importance_cap": 2.0}}).rl.staleness == 1
