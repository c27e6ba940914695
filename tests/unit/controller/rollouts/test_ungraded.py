"""Ungraded responses: how many stop the run, and what is computed from the others."""

import asyncio
import math
from types import SimpleNamespace

import pytest
from r1_grading import Grade
from refusals import refused

from megatron_r1.base.errors import Cause, RunError
from megatron_r1.config import Config, RewardsConfig
from megatron_r1.controller import algorithms
from megatron_r1.controller.loop import training_reward
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.response_grader import check_grades
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout, RolloutSampling
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response


def graded(reward, *ungraded, is_graded=None):
    response = Response([1], [0.0], [0], "stop")
    is_graded = not ungraded if is_graded is None else is_graded
    rewards = {"accuracy": reward, "format": 1.0, "judge": 0.0 if "judge" in ungraded else 0.5}
    reason = f"cannot be graded: {ungraded}" if ungraded else "fine"
    return GradedResponse(response, "x", rewards, reward, reason, ungraded, is_graded)


def test_more_ungraded_answers_than_allowed_stop_the_run():
    prompt = make_prompt("2 + 11?", "judge", "13", {})
    fine, lost = [graded(1.0)] * 20, [graded(0.0, "accuracy")] * 3
    check_grades([Group(prompt, [], fine[:18] + lost[:2])], 0.1)
    check_grades([Group(prompt, [], fine[:3] + lost[:1])], 0.1)  # 0.4 answers: one is allowed
    with pytest.raises(RunError, match="3 of 20 .* 2 .*rewards.max_ungraded: 0.1.*'accuracy'"):
        check_grades([Group(prompt, [], fine[:17]), Group(prompt, [], lost)], 0.1)
    with pytest.raises(RunError, match="1 of 2 "):
        check_grades([Group(prompt, [], [fine[0], lost[0]])], 0.0)
    measured = graded(1.0, "judge", is_graded=True)  # it has no weight
    check_grades([Group(prompt, [], [measured] * 3 + fine[:1])], 0.0)


def test_a_group_that_cannot_be_graded_is_one_of_many():
    """Dynamic sampling may draw it alone; what counts is all that the step has sampled."""

    class Broken:
        async def grade(self, kind, response, truth, **fields):
            return Grade.ungraded("broken")

    class Engine:
        async def generate(self, prompt_ids, n, **sampling):
            return [Response([1], [0.0], [0], "stop")] * n

    text = SimpleNamespace(
        encode=lambda question, before=(): [1],
        decode=lambda ids: "x",
        stop_token_ids=[0],
        opens_thought=False,
        closed_thought="",
    )
    collector = RolloutCollector(Engine(), Broken(), text, RewardsConfig(max_ungraded=0.5))
    prompt = make_prompt("2 + 11?", "math", "13", {})
    alone = asyncio.run(collector.collect([prompt], RolloutSampling(2, 1.0, 1.0, 8)))
    fine = Group(prompt, [], [graded(1.0), graded(0.0)])
    collector.check_grades([*alone.groups, fine])
    with refused("kind", Cause.FAILED, "'math'", "all 2"):
        collector.check_grades(alone.groups)
    other = Group(make_prompt("Sort 3, 1.", "logic", "1, 3", {}), [], alone.groups[0].responses)
    with refused("kind", Cause.FAILED, "'logic'", "'math'", "all 4"):
        collector.check_grades([*alone.groups, other])


def test_ungraded_answers_are_left_out_of_advantages_and_means():
    prompt = make_prompt("2 + 11?", "math", "13", {})
    lost, measured = graded(0.0, "accuracy"), graded(0.0, "judge", is_graded=True)
    groups = [
        Group(prompt, [1], [graded(1.0), lost, measured, graded(1.0)]),
        Group(prompt, [1], [graded(1.0), lost, lost, graded(1.0)]),
    ]
    config = Config()
    rewards = [[training_reward(each, config) for each in group.responses] for group in groups]
    advantages = sum(algorithms.find_algorithm("grpo").outcome_advantages(rewards, config.rl), [])
    wanted = [0.5**0.5, math.nan, -(2**0.5), 0.5**0.5, 0.0, math.nan, math.nan, 0.0]
    assert advantages == pytest.approx(wanted, rel=1e-5, nan_ok=True)
    metrics = rollout_metrics(Rollout(groups, 1.0, 1.0), policy_version=0)
    assert metrics["rewards/ungraded"] == 3 / 8
    assert metrics["accuracy"] == metrics["reward/mean"] == 4 / 5
    assert metrics["judge/mean"] == 0.5 and metrics["groups/zero_variance"] == 0.5
