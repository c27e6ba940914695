"""Weights with a schedule, options, and what a rollout makes of them."""

import asyncio
import json

import pytest
from r1_grading import Grade, RewardPool
from r1_grading.sandbox.limits import Limits, time_limit
from r1_grading.terms import ScheduledWeight, combine, option_names, reward_arguments, weights_at
from refusals import refused

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.response_grader import ResponseGrader, check_grades
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

PREFERENCE_IN_THE_LAST_400 = {
    "accuracy": 1.0,
    "format": 0.1,
    "language": {"weight": 0.1, "from_step": 1301},
    "my.own:reward": {"weight": 0.5, "from_step": 10, "to_step": 20},
}


def test_a_weight_counts_from_its_first_to_its_last_step():
    weights = RewardsConfig(weights=PREFERENCE_IN_THE_LAST_400).weights
    always = {"accuracy": 1.0, "format": 0.1}
    assert weights_at(weights, 1) == weights_at(weights, 9) == always
    assert weights_at(weights, 10) == weights_at(weights, 20) == always | {"my.own:reward": 0.5}
    assert weights_at(weights, 21) == weights_at(weights, 1300) == always
    assert weights_at(weights, 1301) == weights_at(weights, 10**9) == always | {"language": 0.1}


def test_a_weight_of_0_is_measured_and_changes_nothing():
    grades = {"accuracy": Grade(1.0, "yes"), "language": Grade(0.5, "half")}
    weights = weights_at({"accuracy": 1.0, "language": 0.0}, 1)
    reward = combine(grades, weights)
    assert reward.total == 1.0 and reward.terms["language"] == 0.5


def test_a_grade_that_is_none_is_told_from_a_bad_one():
    grades = {
        "accuracy": Grade(0.0, "wrong"),
        "language": Grade.ungraded("no target"),
    }
    assert combine(grades, {}).ungraded == ("language",)


@pytest.mark.parametrize(("weight", "is_graded"), [(0.1, False), (0.0, True), (None, True)])
def test_an_ungraded_term_takes_the_reward_with_it_only_where_it_counts(weight, is_graded):
    grades = {"accuracy": Grade(1.0, "yes"), "judge": Grade.ungraded("no verdict")}
    weights = {"accuracy": 1.0} | ({} if weight is None else {"judge": weight})
    assert combine(grades, weights).is_graded is is_graded


def test_a_schedule_survives_the_resolved_configuration(tmp_path):
    config = configuration.Config(rewards={"weights": PREFERENCE_IN_THE_LAST_400})
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump_recipe(config))
    assert configuration.load_recipe(path) == config
    assert config.rewards.weights["language"] == ScheduledWeight(0.1, 1301)


@pytest.mark.parametrize(
    ("rewards", "key", "cause", "values"),
    [
        ({"weights": {"langage": 0.1}}, "weights.langage", Cause.UNKNOWN, ["language"]),
        ({"weights": {"acuracy": 1}}, "weights.acuracy", Cause.UNKNOWN, ["'accuracy'"]),
        ({"weights": {"format": "much"}}, "weights.format", Cause.MALFORMED, ["much"]),
        ({"weights": {"format": True}}, "weights.format", Cause.MALFORMED, ["true"]),
        ({"weights": {"format": float("nan")}}, "weights.format", Cause.MALFORMED, ["nan"]),
        ({"weights": {"format": {"from_step": 3}}}, "weights.format.weight", Cause.MISSING, []),
        ({"weights": {"format": {"weight": 1, "form_step": 3}}}, "weights.format.form_step",
         Cause.UNKNOWN, ["from_step"]),
        ({"weights": {"format": {"weight": 1, "from_step": 0}}}, "weights.format.from_step",
         Cause.OUT_OF_RANGE, [0]),
        ({"weights": {"format": {"weight": 1, "from_step": None}}}, "weights.format.from_step",
         Cause.OUT_OF_RANGE, [None]),
        ({"weights": {"format": {"weight": 1, "to_step": 2.5}}}, "weights.format.to_step",
         Cause.OUT_OF_RANGE, [2.5]),
        ({"weights": {"format": {"weight": "x"}}}, "weights.format.weight", Cause.MALFORMED, "x"),
        ({"weights": {"format": {"weight": 1, "from_step": 5, "to_step": 4}}},
         "weights.format.to_step", Cause.CONFLICT, [5, 4]),
        ({"weights": {}}, "weights", Cause.EMPTY, []),
        ({"weights": {"accuracy": 0, "format": {"weight": -1}}}, "weights", Cause.EMPTY, [-1]),
        ({"weights": 3}, "weights", Cause.MALFORMED, []),
        ({"max_ungraded": 2}, "max_ungraded", Cause.OUT_OF_RANGE, [1]),
        ({"options": {"langage": {}}}, "options.langage", Cause.UNKNOWN, ["language"]),
        ({"options": {"accuracy": {}}}, "options.accuracy", Cause.UNKNOWN, []),
        ({"options": {"language": "zh"}}, "options.language", Cause.MALFORMED, ["zh"]),
        ({"options": {"language": {"targt": "zh"}}}, "options.language.targt", Cause.UNKNOWN,
         ["target"]),
        ({"options": {"format": {"thought_opened": True}}}, "options.format.thought_opened",
         Cause.UNKNOWN, []),
    ],
)  # fmt: skip
def test_a_mistake_in_the_recipe_names_itself(rewards, key, cause, values):
    with refused(f"rewards.{key}", cause, *values):
        configuration.parse_recipe({"rewards": rewards})


def test_a_prompts_field_wins_over_options_and_facts_over_both():
    options = {"language": {"target": "en"}, "my.own:reward": {"a": 1, "b": 1}}
    facts = {"num_tokens": 7}
    assert reward_arguments("language", options, {}, facts) == {"target": "en", "num_tokens": 7}
    assert reward_arguments("language", options, {"target": "zh"}, facts)["target"] == "zh"
    assert reward_arguments("language", options, {"num_tokens": 1, "tests": "…"}, facts) == {
        "target": "en",
        "num_tokens": 7,
    }
    fields = reward_arguments("my.own:reward", options, {"b": 2, "c": 2, "num_tokens": 2}, facts)
    assert fields == {"a": 1, "b": 2, "c": 2, "num_tokens": 7}


def test_the_options_of_a_registered_reward_come_from_its_signature():
    assert option_names("language") == {"target"}
    assert option_names("conciseness") == {"free_length", "max_length", "unit"}
    assert option_names("repetition") == {"window", "mask_numbers"}


class Text:
    """Tokens are code points."""

    opens_thought, closed_thought = False, ""

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def grader(pool, rewards):
    return ResponseGrader(pool, Text(), rewards.options)


def response(text):
    codes = [ord(char) for char in text]
    return Response(codes, [0.0] * len(codes), [0] * len(codes), "stop")


def grade_at(steps, text, prompt, **rewards):
    async def all_steps():
        async with RewardPool(1, timeout_seconds=300) as pool:
            config = RewardsConfig(**rewards)
            tested, of_steps = grader(pool, config), (weights_at(config.weights, s) for s in steps)
            return [(await tested.grade(prompt, [response(text)], w))[0] for w in of_steps]

    return asyncio.run(all_steps())


GOOD = "<think>the sum is 13</think><answer>13</answer>"


@pytest.mark.more
def test_exactly_the_terms_that_count_are_graded():
    prompt = make_prompt("2 + 11?", "math", "13", {})
    weights = {
        "accuracy": {"weight": 2.0, "to_step": 1},
        "language": {"weight": 0.5, "from_step": 2},
        "conciseness": {"weight": 0.25, "from_step": 3},
    }
    limits = {"free_length": 10, "max_length": 2 * len(GOOD) - 10}
    options = {"language": {"target": "en"}, "conciseness": limits}
    first, second, third = grade_at((1, 2, 3), GOOD, prompt, weights=weights, options=options)
    assert first.rewards == {"accuracy": 1.0, "format": 1.0} and first.reward == 2.0
    assert second.rewards == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert second.reward == 0.5
    # The length comes from the tokens that were sampled.
    assert third.rewards["conciseness"] == 0.5 and third.reward == 0.5 + 0.125


def test_options_reach_the_prompts_own_kind_and_the_prompt_wins():
    options = {"language": {"target": "zh"}}
    for fields, reward in (({}, 0.0), ({"target": "en"}, 1.0)):
        prompt = make_prompt("?", "language", None, fields)
        (graded,) = grade_at((1,), GOOD, prompt, options=options)
        assert graded.rewards["accuracy"] == reward


def test_a_term_without_its_options_is_an_error_before_anything_starts():
    async def check(**rewards):
        async with RewardPool(1, timeout_seconds=300) as pool:
            prompt = make_prompt("2 + 11?", "format", None, {})
            config = RewardsConfig(**rewards)
            await grader(pool, config).check_rewards(config.weights, [prompt])

    late = {"language": {"weight": 0.1, "from_step": 900}}
    with refused("target", Cause.MISSING, "rewards.weights.language"):
        asyncio.run(check(weights=late))
    with refused("nowhere:reward", Cause.FAILED):
        asyncio.run(check(weights={"nowhere:reward": 1.0}))
    asyncio.run(check(weights=late, options={"language": {"target": "zh"}}))


def test_a_term_that_fails_on_every_answer_stops_the_run():
    prompt = make_prompt("2 + 11?", "format", None, {})
    options = {"language": {"target": "fr"}}
    responses = grade_at((1, 1), GOOD, prompt, weights={"language": 1.0}, options=options)
    with refused("rewards.weights.language", Cause.FAILED, 2, "'fr'"):
        check_grades([Group(prompt, [], responses)], 1.0)
    fine = grade_at((1,), GOOD, prompt, weights={"accuracy": 1.0})
    check_grades([Group(prompt, [], responses + fine)], 1.0)
    check_grades([], 1.0)


HANGING = """
import time
from r1_grading import Grade

def nap(response, truth, **entry):
    time.sleep(10**6 if response == "inf" else float(response))
    return Grade(1.0, "rested")
"""


def test_the_meter_counts_what_happened_since_it_was_made(tmp_path, monkeypatch):
    (tmp_path / "sleepers.py").write_text(HANGING)
    monkeypatch.syspath_prepend(str(tmp_path))

    async def grade_twice():
        async with RewardPool(2) as pool:

            async def nap(seconds):
                # Only what never ends runs into its limit.
                pool.timeout_seconds = 1.0 if seconds == "inf" else 300.0
                await pool.grade("sleepers:nap", seconds, None)

            await asyncio.gather(*(nap("0") for _ in range(7)))
            meter = pool.start_meter()
            await asyncio.gather(*(nap(seconds) for seconds in ("0", "0.1", "inf", "nonsense")))
            return meter.read(), pool.start_meter().read()

    busy, idle = asyncio.run(grade_twice())
    json.dumps(busy)
    counted = {name: busy[f"rewards/{name}"] for name in ("graded", "timeouts", "errors")}
    assert counted == {"graded": 2, "timeouts": 1, "errors": 1}
    assert busy["rewards/most_outstanding"] == 4
    assert 0 < busy["rewards/busy"] <= 1
    assert idle["rewards/graded"] == idle["rewards/most_outstanding"] == idle["rewards/busy"] == 0


def test_programs_have_the_time_their_own_limits_add_up_to():
    assert time_limit("math", {"limits": {"total_seconds": 90}}, 5.0) == 5.0
    assert time_limit("code", {}, 5.0) > Limits().total_seconds
    assert time_limit("code", {"limits": {"total_seconds": 90}}, 5.0) > 90
    assert time_limit("code", {"limits": {"total_seconds": 1}}, 300.0) == 300.0
    assert time_limit("code", {"limits": {"total_second": 90}}, 5.0) == 5.0
    assert time_limit("code", {"limits": "none"}, 5.0) == 5.0
