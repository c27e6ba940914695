"""Advantages of rewards that are normalized one by one, against loops in fp64."""

import math

import pytest
import torch
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.controller import algorithms
from megatron_r1.controller.loop import outcome_advantages
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

# accuracy, format and tokens of each response; None: it could not be graded.
ROLLOUT = [
    [(1.0, 1.0, 10), (0.0, 1.0, 38), (1.0, 0.0, 40), None],
    [(0.0, 1.0, 20), (1.0, 0.0, 20), (1.0, 0.0, 25), (0.0, 1.0, 39)],
    [(0.5, 0.5, 9), (0.5, 0.5, 9), (0.5, 0.5, 9), (0.5, 0.5, 9)],
    [None, None, (1.0, 1.0, 30), None],
]
WEIGHTS = {"accuracy": 1.0, "format": 0.5}
LIMIT, EPSILON = 40, 1e-6


def groups_of(rollout):
    groups = []
    for rows in rollout:
        responses = []
        for row in rows:
            accuracy, form, count = row or (0.0, 0.0, 5)
            sampled = Response([1] * count, [0.0] * count, [0] * count, "stop")
            total = WEIGHTS["accuracy"] * accuracy + WEIGHTS["format"] * form
            rewards = {"accuracy": accuracy, "format": form}
            graded = GradedResponse(sampled, "x", rewards, total, "", is_graded=row is not None)
            responses.append(graded)
        groups.append(Group(make_prompt("1 + 1?", "math", "2", {}), [1], responses))
    return groups


def recipe(**rl):
    return parse_recipe(
        {
            "rl": {"group_size": 4, "prompts_per_rollout": 4, "minibatches": 2, **rl},
            "rewards": {"weights": WEIGHTS},
            "rollout": {"max_response_tokens": LIMIT},
        }
    )


def by_definition(columns):
    """The advantages of rewards given as (weight, reward of a row)."""
    totals = {}
    for at, rows in enumerate(ROLLOUT):
        known = [place for place, row in enumerate(rows) if row is not None]
        for place in known:
            totals[at, place] = torch.zeros((), dtype=torch.float64)
        for weight, reward in columns:
            values = torch.tensor([reward(rows[p]) for p in known], dtype=torch.float64)
            deviation = values.std(correction=0)
            for place, value in zip(known, values, strict=True):
                if deviation > 0:
                    score = (value - values.mean()) / (deviation + EPSILON)
                    totals[at, place] = totals[at, place] + weight * score
    every = torch.stack(list(totals.values()))
    mean, std = every.mean(), every.std(correction=0)
    return [
        [
            float((totals[at, place] - mean) / (std + EPSILON)) if row is not None else math.nan
            for place, row in enumerate(rows)
        ]
        for at, rows in enumerate(ROLLOUT)
    ]


def assert_same(made, wanted):
    assert len(made) == len(wanted)
    for own, expected in zip(made, wanted, strict=True):
        assert own == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_each_reward_is_normalized_alone_and_their_sum_over_the_rollout(name):
    config = recipe(algorithm=name, reward_normalization="each")
    made = outcome_advantages(groups_of(ROLLOUT), algorithms.find_algorithm(name), config, 1)
    assert_same(made, by_definition([(1.0, lambda row: row[0]), (0.5, lambda row: row[1])]))
    assert made[1][1] > 0.5 > -0.5 > made[1][0] and made[2] == pytest.approx([0.0] * 4)


def test_the_penalty_of_long_responses_is_a_reward_of_its_own():
    def penalty(row):
        return -min(1.0, max(0.0, (row[2] - 32) / 8))

    rl = {"overlong_buffer": 0.2, "overlong_penalty": 0.3, "reward_normalization": "each"}
    made = outcome_advantages(
        groups_of(ROLLOUT), algorithms.find_algorithm("grpo"), recipe(**rl), 1
    )
    columns = [(1.0, lambda row: row[0]), (0.5, lambda row: row[1]), (0.3, penalty)]
    assert_same(made, by_definition(columns))


def test_a_weight_counts_in_its_steps_only():
    config = parse_recipe(
        {
            "rl": {"group_size": 4, "reward_normalization": "each"},
            "rewards": {"weights": {"accuracy": 1.0, "format": {"weight": 0.5, "from_step": 3}}},
        }
    )
    grpo, groups = algorithms.find_algorithm("grpo"), groups_of(ROLLOUT)
    early, late = (outcome_advantages(groups, grpo, config, step) for step in (2, 3))
    assert_same(early, by_definition([(1.0, lambda row: row[0])]))
    assert_same(late, by_definition([(1.0, lambda row: row[0]), (0.5, lambda row: row[1])]))


def test_the_default_changes_no_bit():
    config, grpo = recipe(), algorithms.find_algorithm("grpo")
    groups = groups_of(ROLLOUT)
    sums = [[r.reward if r.is_graded else None for r in group.responses] for group in groups]
    made = outcome_advantages(groups, grpo, config, 1)
    assert repr(made) == repr(grpo.outcome_advantages(sums, config.rl))


@pytest.mark.parametrize(
    "rl",
    [
        {"algorithm": "rloo"},
        {"algorithm": "reinforce_pp"},
        {"algorithm": "ppo"},
        {"algorithm": "dr_grpo"},
        {"algorithm": "on_policy_distillation"},
        {"advantage_std": "batch"},
        {"algorithm": "dapo"},
    ],
)
def test_where_it_has_no_meaning_it_is_refused(rl):
    parse_recipe(
        {"rl": {"algorithm": "dapo", "dynamic_sampling": False, "reward_normalization": "each"}}
    )
    with refused("rl.reward_normalization", Cause.CONFLICT):
        parse_recipe({"rl": {**rl, "reward_normalization": "each"}})


def test_one_reward_has_no_other_to_be_normalized_apart_from():
    one = {"rewards": {"weights": {"accuracy": 1.0, "format": 0.0}}}
    rl = {"reward_normalization": "each"}
    with refused("rl.reward_normalization", Cause.CONFLICT, "accuracy"):
        parse_recipe({"rl": rl, **one})
    parse_recipe({"rl": {**rl, "overlong_buffer": 0.2}, **one})
