import asyncio

from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse
from megatron_r1.controller.rollouts.dynamic_sampling import collect_informative
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

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

    return asyncio.run(collect_informative(collect, draw, num_groups, rounds)), drawn


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
        parse({"rl": {"staleness": 1}})
    assert parse({"rl": {"staleness": 1, "importance_cap": 2.0}}).rl.staleness == 1
