"""Rewards are tried before engines start: a user's own above all."""

import asyncio

import pytest
from r1_grading import RewardPool
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.response_grader import ResponseGrader
from megatron_r1.data.prompt import make_prompt


class Text:
    opens_thought, closed_thought = False, ""


MINE = """
from r1_grading import Grade

def bare(response, truth):
    return Grade(1.0, "fine")

def alone(response):
    return Grade(1.0, "fine")

def needs(response, truth, *, wanted, **entry):
    return Grade(1.0, "fine")

def answers_only(response, truth, **entry):
    return Grade(float(response.split("<answer>")[1] == truth), "compared")

def raises(response, truth, **entry):
    raise KeyError("weather")

def bare_number(response, truth, **entry):
    return 1.0

def text(response, truth, **entry):
    return Grade("1", "x")

def refuses(response, truth, **entry):
    raise TypeError("of its own")
"""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """A function that tries the rewards of prompts, all in one pool, which finds mine.py."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.syspath_prepend(str(folder))
        patch.chdir(folder)
        pool = RewardPool(1)

        def check(*prompts, **rewards):
            config = RewardsConfig(**rewards)
            grader = ResponseGrader(pool, Text(), config.options)
            runner.run(grader.check_rewards(config.weights, list(prompts)))

        runner.run(pool.__aenter__())
        yield check
        runner.run(pool.__aexit__(None, None, None))


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("mine:bare", ("'num_tokens'", "**entry")),
        ("mine:alone", ("response, truth",)),
        ("mine:raises", ("KeyError: 'weather'", "mine.py:", "<answer>13</answer>")),
        ("mine:refuses", ("TypeError: of its own", "mine.py:")),
        ("mine:bare_number", ("Grade", "float")),
        ("mine:text", ("ValueError", "'1'", "mine.py:")),
    ],
)
def test_a_reward_of_ones_own_is_tried_before_anything_starts(check, kind, shown):
    with refused("kind", Cause.FAILED, "2 + 11?", kind, *shown):
        check(make_prompt("2 + 11?", kind, "13", {}))
    with refused(f"rewards.weights.{kind}", Cause.FAILED, *shown):
        check(make_prompt("2 + 11?", "math", "13", {}), weights={"accuracy": 1.0, kind: 1.0})


def test_a_reward_of_ones_own_may_raise_where_there_is_no_answer(check):
    check(make_prompt("2 + 11?", "mine:answers_only", "13", {}))


def test_the_one_row_that_lacks_a_column_is_found_before_anything_starts(check):
    rows = [make_prompt(f"{i}?", "mine:needs", "13", {"wanted": i}) for i in range(9)]
    check(*rows)
    with refused("wanted", Cause.MISSING, "mine:needs", "rewards.options") as lacking:
        check(*rows, make_prompt("2 + 11?", "mine:needs", "13", {"unwanted": 1}), *rows)
    assert lacking.value.missing == ("wanted",)
    with refused("target", Cause.MISSING, "'language'", "options.language.target"):
        check(make_prompt("?", "language", None, {}))
