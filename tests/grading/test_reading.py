"""Where the final answer is read: each form that a model may give it, and what is no answer."""

from pathlib import Path

import pytest
from r1_grading import logic, math, read_answer
from r1_grading.reading import READINGS

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.config import Config
from megatron_r1.evaluation.voting import read_vote

TAGS, BOX = "<answer>13</answer>", r"so \boxed{13}"
LINES = list(read_lines(Path(__file__).with_name("last_lines.jsonl")))
ENDINGS = list(read_lines(Path(__file__).with_name("endings.jsonl")))
LAST = "Adding both,\nthe sum of 2 and 11 is 13."


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (TAGS, {"strict", "tags", "last", "auto"}),
        (BOX, {"strict", "boxed", "last", "auto"}),
        (LAST, {"last", "auto"}),
        ("#### 13", {"strict", "last", "auto"}),
        ("I do not know", set()),
        ("<think>13", set()),
    ],
)
def test_each_reading_finds_what_is_its_own(response, found):
    graded = {
        reading: math.grade(
            response, "13", reading=reading, thought_opened="<think>" in response
        ).reward
        for reading in READINGS
    }
    assert {reading for reading, reward in graded.items() if reward} == found


@pytest.mark.parametrize("case", LINES, ids=lambda case: case["line"][:40])
def test_the_answer_is_the_last_line_s_number_where_it_is_one_of_its_own(case):
    grade = math.grade(f"First, 99.\n13\n{case['line']}\n\n", case["truth"], reading="auto")
    assert grade.reward == case["reward"], grade.reason
    assert case.get("reason", "") in grade.reason


def test_two_blocks_are_no_answer_though_the_last_line_has_one():
    found = read_answer("<answer>12</answer>\n<answer>13</answer>\n13", "auto", numeric=True)
    assert found.text is None and "2 <answer>" in found.reason


def test_logic_reads_words_and_numbers_as_its_scorer_spells_them():
    sums = {"question": "1,000 + 234", "answer": "1234", "metadata": {}}
    said = "The sum is 1,234."
    assert logic.grade(said, task="chain_sum", entry=sums, reading="auto").reward == 1
    assert logic.grade(said, task="chain_sum", entry=sums).reward == 0


def test_a_recipe_sets_it_for_all_rewards_that_read_answers_and_an_option_wins():
    options = {"math": {"reads_last_line": False}, "logic": {"reading": "tags"}}
    rewards = Config.model_validate({"rewards": {"reading": "auto", "options": options}}).rewards
    assert rewards.call_options == {
        "math": {"reads_last_line": False, "reading": "auto"},
        "logic": {"reading": "tags"},
        "exact_match": {"reading": "auto"},
    }
    assert Config().rewards.call_options == {}


def test_votes_are_read_as_rewards_are():
    assert read_vote(LAST, reading="auto", kind="math", truth_is_number=True).key == 13
    assert read_vote(LAST, reading="boxed", kind="math", truth_is_number=True) is None
    assert read_vote("so\n13", kind="math").key == 13  # graded as an answer, too
    assert read_vote("so\n13", kind="logic") is None


@pytest.mark.parametrize("reading", ["strict", "boxed", "auto"])
@pytest.mark.parametrize(
    ("label", "responses"),
    [
        (0, (r"So $x = -\boxed{13}$.", r"so $-\boxed{13}$", r"$−\boxed{13}$", r"\boxed{13}^2")),
        (0, (r"less than \boxed{13}", r"$x > \boxed{13}$", r"It is not \boxed{13}")),
        (0, (r"\boxed{13} is wrong", r"\boxed{13} million", r"√\boxed{13}", r"$x = - \boxed{13}$")),
        (0, (r"\[ - \boxed{13} \]", r"**-\boxed{13}**", r"x = -$\boxed{13}$", r"$-<b>\boxed{13}$")),
        (0, (r"$\sqrt[3]{\boxed{13}}$", r"$\frac{1}{\boxed{13}}$", r"$\log_2 \boxed{13}$")),
        (0, (r"$\boxed{13}^n$", r"$\boxed{13} - 1$", r"$\boxed{13}-(2+1)$", r"\boxed{13} \pm 1")),
        (0, (r"$\boxed{13}$ is not the answer", r"$\boxed{13}$ isn't right.", r"$\boxed{13}$?")),
        (1, (r"so $x = \boxed{13}$.", r"$\boxed{13}^\circ$", r"It adds up to \boxed{13}")),
        (1, (r"2 + 11 => \boxed{13}", r"not 12 but \boxed{13}", r"\boxed{13} - the smallest")),
        (1, ("Answer:\n- \\boxed{13}\n- 5 is odd", "$$\\boxed{13}$$\n\n* 2 pairs")),
    ],
)
def test_what_is_beside_a_box_may_change_it(label, responses, reading):
    for response in responses:
        grade = math.grade(f"<think>I add.</think>{response}", "13", reading=reading)
        assert grade.reward == label, (response, grade.reason)
        assert label or "next to the box" in grade.reason
    assert math.grade(r"-\boxed{13}", "-13", reading=reading).reward == 0
    assert math.grade(r"about \boxed{3.14}", "3.14", reading=reading).reward == 1


@pytest.mark.parametrize("place", ["box", "line"])
def test_the_last_lines_that_models_write_are_paid(place):
    """Those with a box are paid in the reading last, too, where the last line has the box."""
    refused = []
    for ending in (ending for ending in ENDINGS if ending["place"] == place):
        text, readings = ending["ending"], {"auto"}
        readings |= {"strict", "boxed"} if place == "box" else {"last"}
        readings |= {"last"} if r"\boxed" in text.rpartition("\n")[2] else set()
        for reading in readings:
            grade = math.grade(f"First, 2 + 97 = 99.\n{text}", ending["truth"], reading=reading)
            if grade.reward != 1:
                refused.append(f"{reading}: {text!r}: {grade.reason}")
    assert not refused, "\n".join(refused)


def test_a_changed_box_is_no_answer_in_logic_and_votes_either():
    sums = {"question": "2 + 11", "answer": "13", "metadata": {}}
    grade = logic.grade(r"It is $-\boxed{13}$", task="chain_sum", entry=sums, reading="boxed")
    assert grade.reward == 0 and "next to the box" in grade.reason
    assert read_vote(r"It is $-\boxed{13}$", kind="math") is None
