import pytest
from r1_grading import math

from megatron_r1.data.prompt import make_prompt
from megatron_r1.evaluation.voting import expects_number, majority_index, read_vote


def answer(text):
    return f"<think>hm</think><answer>{text}</answer>"


def majority(responses):
    return majority_index([vote and vote.key for vote in map(read_vote, responses)])


def test_the_most_frequent_answer_wins_whatever_its_spelling():
    responses = [answer("7"), answer("12"), answer(r"\boxed{12}"), answer("12.0"), answer("7")]
    assert majority(responses) == 1


def test_responses_without_an_answer_do_not_vote():
    assert majority(["I do not know", "no", answer("3")]) == 2
    assert majority(["I do not know"]) is None
    assert majority([]) is None


def test_a_tie_goes_to_the_first():
    assert majority([answer("x"), answer("y"), answer("Y"), answer("X")]) == 0


@pytest.mark.parametrize(
    ("truth", "is_one_number"),
    [
        *((18, True), ("18", True), ("$18$", True), (r"\boxed{18}", True)),
        *(("She sells 9 * 2 = 18.\n#### 18", True), ("18 eggs", False), ("x + 18", False)),
    ],
)
def test_answers_to_a_number_vote_as_the_reward_reads_them(truth, is_one_number):
    prompt = make_prompt("?", "math", truth, {})
    assert expects_number(prompt) == is_one_number
    wrong = ("She eats 3 so she has 17 eggs left.", "Therefore she is left with 17 eggs.")
    votes = [
        read_vote(text, reading="auto", kind="math", truth_is_number=expects_number(prompt))
        for text in wrong
    ]
    reasons = [math.grade(text, truth, reading="auto").reason for text in wrong]
    assert (votes[0].key == votes[1].key == 17) == is_one_number
    assert all(reason.startswith("wrong: 17,") for reason in reasons) == is_one_number
