"""The math reward against labels: those of `math_pairs`, by hand, and math-verify's own tests."""

import re
from pathlib import Path

import pytest
from math_pairs import FORMS, PAIRS
from math_upstream import AGREED, STRICTER

from megatron_r1.rewards import math as math_reward

PAGE = Path(__file__).parents[4] / "docs" / "rewards" / "math.md"


def reward(truth, answer):
    return math_reward.grade(f"<think>…</think><answer>{answer}</answer>", truth)


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_every_form_get_the_reward_a_person_would_give(form):
    wrong = []
    for truth, answer, label, why in FORMS[form]:
        grade = reward(truth, answer)
        if grade.reward != label:
            wrong.append(f"{truth!r} / {answer!r} ({why}): {grade.reward}, {grade.reason}")
    assert not wrong, "\n".join(wrong)


def test_there_are_enough_labels_of_both_kinds_and_none_contradicts_another():
    labels = {}
    for _, truth, answer, label, why in PAIRS:
        assert labels.setdefault((truth, answer), label) == label, (truth, answer)
        assert label in (0, 1) and why
    assert len(labels) >= 300
    assert 0.4 < sum(labels.values()) / len(labels) < 0.6


@pytest.mark.parametrize("truth", sorted({pair[1] for pair in PAIRS}))
def test_every_truth_is_its_own_answer_in_a_box_and_as_a_last_line(truth):
    if r"\boxed" not in truth:
        assert math_reward.grade(rf"so \boxed{{{truth}}}", truth).reward == 1.0
        assert math_reward.grade(f"I think so.\nThe answer is {truth}", truth).reward == 1.0


@pytest.mark.parametrize(("test", "truth", "response", "label"), AGREED)
def test_agrees_with_what_math_verify_tests_expect(test, truth, response, label):
    assert math_reward.grade(response, truth).reward == label


@pytest.mark.parametrize(("test", "truth", "response", "upstream", "reason"), STRICTER)
def test_differs_from_math_verify_only_where_it_says_so(test, truth, response, upstream, reason):
    assert upstream == 1 and reason
    assert math_reward.grade(response, truth).reward == 0.0


def test_the_page_shows_rewards_as_they_are():
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([01]) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 40
    for truth, answer, label in rows:
        truth, answer = (cell.replace(r"\|", "|") for cell in (truth, answer))
        grade = reward(truth, answer)
        assert grade.reward == float(label), (truth, answer, grade.reason)
