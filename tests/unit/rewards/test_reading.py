"""Where the final answer is read: each form that a model may give it, and what is no answer."""

import pytest
from final_sentences import BOXED, LINES

from megatron_r1.config import Config
from megatron_r1.evaluation.voting import read_vote
from megatron_r1.rewards import logic, math
from megatron_r1.rewards.reading import READINGS, read_answer

TAGS, BOX = "<answer>13</answer>", r"so \boxed{13}"
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
        reading: math.grade(response, "13", reading=reading, opened="<think>" in response).reward
        for reading in READINGS
    }
    assert {reading for reading, reward in graded.items() if reward} == found


@pytest.mark.parametrize(
    ("line", "truth"),
    [
        ("The answer is **13**.", "13"),
        ("2 + 11 = 13", "13"),
        ("$2 + 11 = 13$", "13"),
        (r"\(x = -13\)", "-13"),
        ("That makes 13 apples in 3 baskets, so the answer is 13.", "13"),
        ("Her total is $1,234.50.", "1234.5"),
        ("It is 1/2.", "1/2"),
        (r"so $\frac{1}{2}$", "1/2"),
        ("13<|im_end|>", "13"),
        ("Final answer: 13%", "13"),
        ("So, 2 + 11 = **13**.", "13"),
        ("It equals 13!", "13"),
        ("Here, 12 is not prime, so the answer is 13", "13"),
        *(("The answer is −13.", "-13"), ("(−13)", "-13"), ("x = - 13", "-13"), ("- 13", "13")),
        *(("The answer is −1/2.", "-1/2"), ("1⁄5", "1/5"), ("The answer is 2 5/8.", "21/8")),
        *(("1 500", "1500"), ("It is 1 234 567.", "1234567"), ("-2 5/8", "-21/8")),
        *(("In 3 hours, she makes 13.", "13"), ("1) 13", "13"), ("n - 3 = 13", "13")),
    ],
)
def test_the_last_line_s_number_is_the_answer(line, truth):
    grade = math.grade(f"First, 99.\n{line}\n\n", truth, reading="auto")
    assert grade.reward == 1 and "in the last line" in grade.reason, grade.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("It is 12 or 13.", "two numbers end the last line: 12 or 13"),
        ("12, 13", "two numbers"),
        ("2 + 11", "two numbers"),
        ("It is not 13.", "the last line denies 13"),
        ("It cannot be equal to 13.", "denies"),
        ("It is less than 13.", "denies"),
        ("It is approximately 13", "denies"),
        ("half of 13", "denies"),
        ("The wrong answer is 13.", "denies"),
        ("x > 13", "denies"),
        (r"x \neq 13", "denies"),
        ("I don't think it is 13.", "denies"),
        ("13 is wrong", "denies"),
        ("13 million", "denies"),
        ("13 or so", "denies"),
        ("Is it 13?", "denies"),
        ("12 to 13", "two numbers"),
        ("12 (or 13)", "two numbers"),
        ("12 vs. 13", "two numbers"),
        ("3 times 13", "denies"),
        ("The 13th", "wrong: The 13th"),
        ("It starts at 3:13", "wrong"),
        ("113", "wrong: 113"),
        ("13.5", "wrong: 13.5"),
        ("x^13", "wrong"),
        ("13 " * 900, "the last line has 2699 characters"),
        *((line, "wrong: -13") for line in ("The answer is −13.", "(−13)", "x = - 13")),
        *((line, "two numbers") for line in ("Answer: 14 − 13", "14 – 13", "12 13")),
        *((line, "two numbers") for line in ("3 hours 13 minutes", "2 ft and 13 in")),
        *((line, "two numbers") for line in ("12 remainder 13", "12 R 13")),
        *((line, "a root") for line in ("The answer is √13.", "3√13")),
        *((line, "wrong") for line in ("1⁄13", "2 13/8", "1 013")),
        *((line, "denies") for line in ("so √ 13", "√(13)")),
        *((line, "part of an expression") for line in ("2x + 13", "n - 13", "n -13")),
        *((line, "part of an expression") for line in ("13 - x", "13-14", "13+x", "13 ⅝")),
        *((line, "part of an expression") for line in ("x = 13 - B", "so $n - 13$")),
        *((line, "two numbers") for line in ("3 hours, 13 minutes", "12 dollars and 13 cents")),
        *((line, "two numbers") for line in ("4 lbs 13 oz", "3 weeks and 13 days", "It is 12 13.")),
        ("5 apples + 13", "part of an expression"),
    ],
)
def test_what_is_no_number_of_its_own_is_no_answer(line, reason):
    grade = math.grade(f"13\n{line}", "13", reading="auto")
    assert grade.reward == 0 and reason in grade.reason, grade.reason


def test_two_blocks_are_no_answer_though_the_last_line_has_one():
    found = read_answer("<answer>12</answer>\n<answer>13</answer>\n13", "auto", numeric=True)
    assert found.text is None and "2 <answer> blocks" in found.reason


def test_logic_reads_words_and_numbers_as_its_scorer_spells_them():
    sums = {"question": "1,000 + 234", "answer": "1234", "metadata": {}}
    said = "The sum is 1,234."
    assert logic.grade(said, task="chain_sum", entry=sums, reading="auto").reward == 1
    assert logic.grade(said, task="chain_sum", entry=sums).reward == 0


def test_a_recipe_sets_it_for_all_rewards_that_read_answers_and_an_option_wins():
    options = {"math": {"plain_line": False}, "logic": {"reading": "tags"}}
    rewards = Config.model_validate({"rewards": {"answer": "auto", "options": options}}).rewards
    assert rewards.call_options == {
        "math": {"plain_line": False, "reading": "auto"},
        "logic": {"reading": "tags"},
    }
    assert Config().rewards.call_options == {}


def test_votes_are_read_as_rewards_are():
    assert read_vote(LAST, reading="auto", kind="math", numeric=True).key == 13
    assert read_vote(LAST, reading="boxed", kind="math", numeric=True) is None
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
        assert label or "beside the box of 13" in grade.reason
    assert math.grade(r"-\boxed{13}", "-13", reading=reading).reward == 0
    assert math.grade(r"about \boxed{3.14}", "3.14", reading=reading).reward == 1


@pytest.mark.parametrize(
    ("readings", "sentences"),
    [(("strict", "boxed", "auto"), BOXED), (("auto", "last"), LINES)],
    ids=["boxed", "lines"],
)
def test_sentences_that_models_end_with_are_paid(readings, sentences):
    refused = []
    for truth, sentence in sentences:
        last = ("last",) if r"\boxed" in sentence.rpartition("\n")[2] else ()
        for reading in (*readings, *last):
            grade = math.grade(f"First, 2 + 97 = 99.\n{sentence}", truth, reading=reading)
            if grade.reward != 1:
                refused.append(f"{reading}: {sentence!r}: {grade.reason}")
    assert not refused, "\n".join(refused)


def test_a_changed_box_is_no_answer_in_logic_and_votes_either():
    sums = {"question": "2 + 11", "answer": "13", "metadata": {}}
    grade = logic.grade(r"It is $-\boxed{13}$", task="chain_sum", entry=sums, reading="boxed")
    assert grade.reward == 0 and "beside the box" in grade.reason
    assert read_vote(r"It is $-\boxed{13}$", kind="math") is None


@pytest.mark.parametrize("text", [" " * 200_000 + "x", "$ " * 100_000, "1" * 200_000, "1," * 900])
def test_a_long_response_takes_time_linear_in_its_length(text):
    for reading in READINGS:  # quadratic matching would take minutes
        read_answer(text, reading, plain_line=True, numeric=True)
