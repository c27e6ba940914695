"""No task of reasoning-gym pays a constant answer, or its own answer with a change that matters."""

import functools
import random
import re

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.rewards import logic

TASKS = sorted(set(DATASETS) - set(logic.UNGUARDED))
CONSTANTS = [
    *("0", "1", "-1", "2", "24", "0.0", "1e999", "nan", "inf", "nan+nanj", "6*4*1*1", "8*3*1*1"),
    *("yes", "no", "True", "False", "None", "hello", "a", "A", "x", "?", "1 2 3", "0 0", "unknown"),
    *("", "00", "-0", "-inf", "null", "N/A", "I don't know", "A B C", "()()", "_ _", "0, 0", "1=1"),
    *("[]", "{}", "()", "[[0]]", '{"a": 1}', "[1]", '[{"a": 1}]', '[{"a": "b"}]', "1/0", "2 x 2"),
]
# Numbers are graded within a tolerance, and sentences by their names.
TOLERANT = {
    *("advanced_geometry", "codeio", "coin_flip", "decimal_arithmetic", "number_format"),
    *("number_sorting", "pool_matrix", "power_function"),
}


@functools.cache
def entries(task, count=2):
    dataset = reasoning_gym.create_dataset(task, size=count, seed=11)
    return [dataset[i] for i in range(count)]


def reward(task, entry, answer):
    return logic.grade(f"<answer>{answer}</answer>", task=task, entry=entry).reward


def same(one, other):
    try:
        return float(one) == float(other)
    except ValueError:
        return one.strip().lower() == other.strip().lower()


@pytest.mark.parametrize("task", TASKS)
def test_constant_answers_are_worth_nothing(task):
    for entry in entries(task):
        for constant in CONSTANTS:
            if not same(constant, str(entry["answer"])):
                assert reward(task, entry, constant) < 1, f"{constant} for {entry['answer']}"


@pytest.mark.parametrize("task", TASKS)
def test_the_question_its_examples_and_a_long_text_are_worth_nothing(task):
    for entry in entries(task):
        question, answer = entry["question"], str(entry["answer"])
        quoted = re.findall(r"\"([^\"\n]{1,80})\"|'([^'\n]{1,80})'|`([^`\n]{1,80})`", question)[:4]
        shown = re.findall(r"[Ee]xample[^\n]*\n?([^\n]{1,200})", question)[:3]
        texts = [question[:19_000], "the answer is " * 200, *shown]
        for text in texts + [part for parts in quoted for part in parts if part]:
            if not same(text, answer):
                assert reward(task, entry, text) < 1, f"{text[:80]} for {answer}"


@pytest.mark.parametrize("task", sorted(set(TASKS) - TOLERANT))
def test_another_number_is_worth_nothing(task):
    for entry in entries(task):
        answer = str(entry["answer"])
        for digit in list(re.finditer(r"\d", answer))[:1]:
            other = str(int(digit[0]) % 9 + 1)
            changed = answer[: digit.start()] + other + answer[digit.end() :]
            if entry["answer"] is not None and not same(changed, answer):
                assert reward(task, entry, changed) < 1, f"{changed} for {answer}"


def test_the_tasks_own_answers_are_right():
    for task in logic.GUARDS:
        for entry in entries(task):
            if entry["answer"] is not None:
                assert reward(task, entry, entry["answer"]) == 1.0, (task, entry["answer"])


WORDS = ("it is not {}", "{} is wrong", "{} or 7", "7 {}")
LENIENT = {
    # A constant in front of an integral is a constant of it.
    *("intermediate_integration", "simple_integration"),
}


@pytest.mark.parametrize("task", sorted(set(TASKS) - LENIENT))
def test_words_around_the_answer_are_refused(task):
    for entry in entries(task):
        if entry["answer"] is not None:
            for words in WORDS:
                text = words.replace("{}", str(entry["answer"]))
                assert reward(task, entry, text) < 1, text


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("coin_flip", "0"),
        ("gsm_symbolic", "-{}"),
        ("fraction_simplification", "{} 7"),
        ("word_sorting", "{}, 7"),
        ("kakurasu", "{} 7"),
        ("time_intervals", "-{}"),
        ("advanced_geometry", "{}, 7"),
        ("polynomial_equations", "{}, x"),
        ("knights_knaves", "{} Zoe is a knave."),
    ],
)
def test_what_a_scorer_would_pass_over_is_refused(task, answer):
    for entry in entries(task):
        assert reward(task, entry, answer.replace("{}", str(entry["answer"]))) == 0


def test_random_walks_do_not_find_the_exit():
    draw = random.Random(1)
    walk = [f"{draw.choice('ABCDEFGHIJK')}{draw.choice('+-')}1" for _ in range(4000)]
    for entry in entries("rush_hour", 12):
        assert reward("rush_hour", entry, " ".join(walk)) == 0
    board = {"board_config": "FCCDDDFooooIGoxAAIGoHoooooHEEEoooooo", "min_moves": 6}
    solvable = {"answer": None, "metadata": board}
    solution = "F+1 E+1 B-1 C-1 H-1 A+1"
    assert reward("rush_hour", solvable, solution) == 1
    assert reward("rush_hour", solvable, f"It is not {solution}") == 0
    assert reward("rush_hour", solvable, " ".join([*["A-1"] * 60, solution])) == 0


def test_a_scorer_that_raises_on_an_answer_gives_nothing_and_on_an_entry_raises():
    (entry, *_) = entries("prime_factorization")
    grade = logic.grade("<answer>two and seven</answer>", task="prime_factorization", entry=entry)
    assert grade.reward == 0 and grade.is_graded and "cannot read" in grade.reason
    with pytest.raises(ValueError, match="two"):
        reward("prime_factorization", {**entry, "answer": "two"}, "2 x 7")


@pytest.mark.parametrize("task", sorted(logic.GUARDS))
def test_a_hostile_answer_is_graded_0_and_does_not_raise(task):
    """Raising would leave the response out of the group's mean instead of counting it as wrong."""
    hostile = (
        "9" * 5000,
        "9," * 5000,
        "0." + "9" * 5000,
        "[" * 15_000,
        '[{"a":' * 3000,
        "²",
        "٣/0",
    )
    for entry in entries(task):
        for answer in hostile:
            grade = logic.grade(f"<answer>{answer}</answer>", task=task, entry=entry)
            assert grade.reward < 1 and grade.is_graded, (grade, answer[:10])


def test_a_task_without_guards_is_refused_by_name():
    with pytest.raises(ValueError, match="does not grade the task 'composite'"):
        reward("composite", {"answer": "1", "metadata": {}}, "1")
