"""Grades, kinds of rewards, the final answer of a response, and the sum of terms."""

import inspect
from pathlib import Path

import pytest
from r1_grading import Grade
from r1_grading.reading.tags_and_boxes import (
    extract_answer,
    final_answers,
    last_boxed,
    unwrap_answer,
)
from r1_grading.rewards import GRADERS, RESPONSE_ONLY_REWARDS, resolve_reward
from r1_grading.terms import combine
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.base.user_code import find_function

ANSWERS = list(read_lines(Path(__file__).with_name("answers.jsonl")))


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan")])
def test_a_grade_is_a_number_between_0_and_1(reward):
    assert Grade(1, "fine").reward == 1.0
    with pytest.raises(ValueError, match=str(reward)):
        Grade(reward, "?")


def test_a_reason_is_one_short_line():
    reason = Grade(0.0, "a\nb " + "x" * 10_000).reason
    assert reason.startswith("a b x") and len(reason) <= 500


def test_a_registered_name_and_a_path_are_kinds():
    assert resolve_reward("math") == GRADERS["math"]
    assert resolve_reward("mine.rewards:brevity") == "mine.rewards:brevity"


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("maths", "'math'"),
        ("Format", "'format'"),
        ("mine.rewards.brevity", "'mine.rewards:brevity'"),
        ("mine/rewards.py:brevity", "'mine.rewards:brevity'"),
        ("accuracy", ""),
        ("a b:c", ""),
    ],
)
def test_an_unknown_kind_names_the_nearest_if_one_is_near(kind, near):
    with refused("kind", Cause.UNKNOWN, repr(kind), near, *GRADERS) as caught:
        resolve_reward(kind)
    assert bool(near) == ("did you mean" in str(caught.value))


def test_python_s_own_functions_and_the_kind_of_an_environment_are_no_rewards():
    with refused("kind", Cause.UNSUPPORTED, "builtins:exec"):
        resolve_reward("builtins:exec")
    with refused("kind", Cause.CONFLICT, "environment", "agents"):
        find_function(resolve_reward("environment"))("13", "13", level=3)


@pytest.mark.parametrize("kind", RESPONSE_ONLY_REWARDS)
def test_a_reward_of_the_form_needs_no_truth(kind):
    parameters = inspect.signature(find_function(RESPONSE_ONLY_REWARDS[kind])).parameters
    assert parameters["truth"].default is None


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case["response"][:40])
def test_the_answer_is_what_the_response_commits_to(case):
    assert extract_answer(case["response"], **case.get("options", {})).text == case["answer"]


def test_nested_braces_and_decoration_come_off():
    assert last_boxed(r"\boxed{a\}{b}}") == r"a\}{b}"
    for box in (r"\boxed 13", r"\boxed13.", r"\fbox{13}", r"\boxed {13}", r"so \boxed 13 or so"):
        assert last_boxed(box) == "13"
    assert last_boxed(r"\boxed it") is last_boxed(r"\boxed{13") is None
    assert last_boxed(r"\boxed{\boxed{13}}") == r"\boxed{13}"
    for decorated in (
        "13",
        " 13. ",
        "$13$",
        r"\(13\)",
        r"\boxed{13}",
        r"$\boxed{13}.$",
        "$$13$$",
        "x #### 13",
    ):
        assert unwrap_answer(decorated) == "13"
    assert unwrap_answer(r"\text{north}") == "north"
    assert unwrap_answer(r"\text{a} + \text{b}") == r"\text{a} + \text{b}"
    assert unwrap_answer("$1$ or $2$") == "$1$ or $2$"


@pytest.mark.parametrize(
    ("block", "answers"),
    [
        (r"\boxed{12}, no: \boxed{13}", ["12", "13"]),
        (r"\boxed{12} or \boxed{13}", ["12, 13"]),
        (r"\boxed{13}, so \fbox{13}", ["13"]),
        (r"12 \boxed{13} 14", ["12", "14", "13"]),
        (r"so 12 boxes, \boxed{13} each", ["13"]),
        (r"\boxed{12\boxed{13}}", ["12", r"12\boxed{13}"]),
        (r"The answer is 12. \boxed{13}", ["12", "13"]),
        ("12 #### 13", ["12", "13"]),
        ("6 + 7\n#### 13", ["13"]),
        ("#### 12\n#### 13", ["12", "13"]),
        ("#### Solution\n6 + 7\n#### 13", ["13"]),
        ("#### Solution\n6 + 7\n13", ["#### Solution\n6 + 7\n13"]),
        ("12 or 13", ["12 or 13"]),
    ],
)
def test_a_block_that_contradicts_itself_has_several_answers(block, answers):
    assert final_answers(block) == answers


def test_terms_are_weighted_and_named():
    grades = {"accuracy": Grade(1.0, "correct: 13"), "format": Grade(1.0, "format as asked")}
    assert combine(grades).total == pytest.approx(1.1)
    assert combine(grades).terms == {"accuracy": 1.0, "format": 1.0}
    assert combine(grades).reason == "correct: 13; format as asked"
    assert combine(grades, {"accuracy": 0.5}).total == 0.5
    with pytest.raises(ValueError, match="'language'"):
        combine(grades, {"language": 1.0})
