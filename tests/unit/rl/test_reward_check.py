"""Rewards are tried before engines start: a user's own above all."""

import asyncio

import pytest

from megatron_r1.config import RewardsConfig
from megatron_r1.data.prompts import make_prompt
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rl.grading import ResponseGrader


class Text:
    opens_thought = False


MINE = """
from megatron_r1.rewards import Grade

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


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def check(*prompts, **rewards):
    async def run():
        async with RewardPool(1) as pool:
            config = RewardsConfig(**rewards)
            grader = ResponseGrader(pool, Text(), config.options)
            await grader.check_rewards(config.weights, list(prompts))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mine:bare", "'mine:bare' is called with 'num_tokens' and does not take it: end its para"
         r"meters with [*][*]entry, def bare.response, truth, [*], …, [*][*]entry. -> Grade"),
        ("mine:alone", "'mine:alone' must take a response and a truth: def alone.response, truth"),
        ("mine:needs", "'mine:needs' needs wanted: give it in the row, or for all rows as "
         "rewards.options.mine:needs.wanted"),
        ("mine:raises", r"cannot be graded: KeyError: 'weather' \(mine.py:\d+\), called with the "
         r"response '<think>I think.</think>.n<answer>13</answer>'$"),
        ("mine:refuses", r"cannot be graded: TypeError: of its own \(mine.py:\d+\), called with"),
        ("mine:bare_number", r"must return a Grade, got float: return Grade\(number from 0 to 1"),
        ("mine:text", r"ValueError: the reward must be a number, got '1' \(mine.py:\d+\), called"),
    ],
)  # fmt: skip
def test_a_reward_of_ones_own_is_tried_before_anything_starts(mine, kind, message):
    with pytest.raises(ValueError, match=f"question '2 [+] 11[?]': its {kind} answer .*{message}"):
        check(make_prompt("2 + 11?", kind, "13", {}))
    with pytest.raises(ValueError, match=f"rewards.weights.{kind}: it .*{message}"):
        check(make_prompt("2 + 11?", "math", "13", {}), weights={"accuracy": 1.0, kind: 1.0})


def test_a_reward_of_ones_own_may_raise_where_there_is_no_answer(mine):
    check(make_prompt("2 + 11?", "mine:answers_only", "13", {}))


def test_the_one_row_that_lacks_a_column_is_found_before_anything_starts(mine):
    rows = [make_prompt(f"{i}?", "mine:needs", "13", {"wanted": i}) for i in range(9)]
    check(*rows)
    with pytest.raises(ValueError, match="needs wanted") as lacking:
        check(*rows, make_prompt("2 + 11?", "mine:needs", "13", {"unwanted": 1}), *rows)
    assert lacking.value.missing == ("wanted",)
    with pytest.raises(ValueError, match="reward 'language' needs target: .*options.language.targ"):
        check(make_prompt("?", "language", None, {}))
