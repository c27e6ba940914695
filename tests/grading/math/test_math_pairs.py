r"""The math reward against labels: those of `pairs.jsonl`, by hand, and math-verify's own tests.

The labels of `pairs.jsonl` say what a careful human grader would decide, and 0 where two readings
are possible. They were written before the comparison was run on them; none was taken from another
project's tests. Rows of `upstream.jsonl` name the test of math-verify 0.9.0 (tests/<file>::<name>
in its sdist) whose expectation they state; the inputs are written anew, in the form that test
covers. `why` says why the reward is 0 where upstream's label is 1. `upstream_verdicts.py FOLDER`
runs its own cases, from an unpacked sdist, and prints where our verdict differs.
"""

import re
from pathlib import Path

import pytest
from r1_grading import math as math_reward

from megatron_r1.base.files.json_lines import read_lines

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "rewards" / "math.md"
PAIRS = list(read_lines(HERE / "pairs.jsonl"))
UPSTREAM = list(read_lines(HERE / "upstream.jsonl"))


def answered(answer):
    return f"<think>…</think><answer>{answer}</answer>"


def assert_rewards(cases):
    """cases: (response, truth, reward)."""
    grades = [(case, math_reward.grade(*case[:2])) for case in cases]
    wrong = [f"{case}: {grade.reason}" for case, grade in grades if grade.reward != case[2]]
    assert grades and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("form", dict.fromkeys(pair["form"] for pair in PAIRS))
def test_answers_of_every_form_get_the_reward_a_person_would_give(form):
    pairs = [pair for pair in PAIRS if pair["form"] == form]
    assert_rewards((answered(pair["answer"]), pair["truth"], pair["reward"]) for pair in pairs)


@pytest.mark.parametrize("ending", [r"so \boxed{%s}", "I think so.\nThe answer is %s"])
def test_every_truth_is_its_own_answer_in_a_box_and_as_a_last_line(ending):
    truths = {pair["truth"] for pair in PAIRS if r"\boxed" not in pair["truth"]}
    assert_rewards((ending % truth, truth, 1) for truth in sorted(truths))


@pytest.mark.parametrize("test", dict.fromkeys(case["test"] for case in UPSTREAM))
def test_differs_from_what_math_verify_tests_expect_only_where_it_says_so(test):
    cases = [case for case in UPSTREAM if case["test"] == test]
    assert_rewards((case["response"], case["truth"], case["reward"]) for case in cases)


def test_the_page_shows_rewards_as_they_are():
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([01]) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    cells = [[cell.replace(r"\|", "|") for cell in row] for row in rows]
    assert_rewards((answered(answer), truth, float(label)) for truth, answer, label in cells)
