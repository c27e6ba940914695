"""The logic reward: no task pays a constant answer, its own answer with a change that matters, or a
program; and what a recipe or a row may get wrong."""

import contextlib
import functools
import io
import json
import random
import re

import pytest
import reasoning_gym
from r1_grading import logic
from r1_grading.formula_bounds import is_formula, scorer_refusal_reason
from r1_grading.task_guards import GUARDS
from reasoning_gym.factory import DATASETS

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
# A constant in front of an integral is a constant of it.
LENIENT = ("intermediate_integration", "simple_integration")
WORDS = ("it is not {}", "{} is wrong", "{} or 7", "7 {}")
# Making or grading one entry takes half a second or more.
COSTLY = ("arc_agi", "intermediate_integration")
SUM = {"question": "4 - 1 =", "answer": "3", "metadata": {}}


@functools.cache
def entries(task, count=None):
    count = count or (1 if task in COSTLY else 2)
    dataset = reasoning_gym.create_dataset(task, size=count, seed=12)
    return [dataset[i] for i in range(count)]


def grade(answer, task="chain_sum", entry=SUM, **options):
    return logic.grade(f"<answer>{answer}</answer>", task=task, entry=entry, **options)


def reward(task, entry, answer):
    return grade(answer, task, entry).reward


def same(one, other):
    try:
        return float(one) == float(other)
    except ValueError:
        return one.strip().lower() == other.strip().lower()


def wrong_answers(task, entry):
    """Constants, parts of the question, a long text, and the answer with another digit or with
    words around it."""
    question, answer = entry["question"], str(entry["answer"])
    yield from CONSTANTS[:: 5 if task in COSTLY else 1]
    yield question[:19_000]
    yield "the answer is " * 200
    yield from re.findall(r"[Ee]xample[^\n]*\n?([^\n]{1,200})", question)[:3]
    quoted = re.findall(r"\"([^\"\n]{1,80})\"|'([^'\n]{1,80})'|`([^`\n]{1,80})`", question)[:4]
    yield from (part for parts in quoted for part in parts if part)
    if entry["answer"] is None:
        return
    if task not in TOLERANT and (digit := re.search(r"\d", answer)):
        yield answer[: digit.start()] + str(int(digit[0]) % 9 + 1) + answer[digit.end() :]
    if task not in LENIENT:
        yield from (words.replace("{}", answer) for words in WORDS)


@pytest.mark.first_cases(21)
@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_are_worth_nothing(task):
    for entry in entries(task):
        for text in wrong_answers(task, entry):
            if not same(text, str(entry["answer"])):
                assert reward(task, entry, text) < 1, f"{text[:80]} for {entry['answer']}"


def test_the_tasks_own_answers_are_right_and_survive_json():
    for task in (*GUARDS, "arc_agi", "rearc", "countdown", "n_queens", "number_sorting"):
        for entry in json.loads(json.dumps(entries(task))):
            if entry["answer"] is not None:
                assert reward(task, entry, entry["answer"]) == 1.0, (task, entry["answer"])


def test_the_scorer_of_the_task_decides_and_the_reason_shows_both_answers():
    (entry, *_) = entries("chain_sum")
    right, wrong = (grade(answer, entry=entry) for answer in (entry["answer"], "no idea"))
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert "no idea" in wrong.reason and entry["answer"] in wrong.reason


def test_partial_credit_is_0_unless_asked_for():
    # chain_sum's scorer gives len(truth) / len(answer) where the answer contains the truth.
    assert grade("it's 3").reward == 0.0
    assert grade("it's 3", exact=False).reward == pytest.approx(1 / 6)


@pytest.mark.parametrize("form", [r"\boxed{3}", "$3$", r"$\boxed{3}$", "$$3$$", r"\fbox{ 3 }"])
def test_an_answer_is_read_in_a_box_or_dollar_signs(form):
    rewards = [grade(answer).reward for answer in (form, f"2 {form}", "$3$ $4$")]
    assert rewards == [1.0, 0.0, 0.0]


def test_no_scorer_runs_the_answer_as_code(tmp_path):
    trace = tmp_path / "trace"
    for task in TASKS:
        (entry, *_) = entries(task)
        for program in (f"open({str(trace)!r}, 'w')", f"__import__('os').mkdir({str(trace)!r})"):
            with contextlib.redirect_stdout(io.StringIO()):
                assert reward(task, entry, program) == 0.0, task
            assert not trace.exists(), task


def test_formulas_are_told_from_programs():
    for formula in ("(3 + 4) * 5", "-34*x**8/15 - 5*x/4 + C", "sin(x)^2 + 2x", "1.5*exp(X)"):
        assert is_formula(formula), formula
    for program in ("open(1)", "x.y", "eval (x)", "S('1')", "x__y", "[1]", "ｅｖａｌ(1)", "x2"):
        assert not is_formula(program), program


@pytest.mark.parametrize(
    "formula",
    [
        *("3+5+7+0*9**9**9", "9^9^9", "(x + y)**(9**9)", "((x + 1)**60)**60", "2**-9**9"),
        *("2**(10**5)", "exp(exp(exp(9)))", "09**9**9", "(" * 900 + "1" + ")" * 900),
        "1*" * 900 + "9**9**" * 30 + "9",
    ],
)
def test_no_scorer_evaluates_what_is_too_large(formula):
    entry = {"answer": None, "metadata": {"numbers": [3, 5, 7], "target": 15}}
    assert scorer_refusal_reason(formula)
    assert reward("countdown", entry, formula) == 0.0


def test_formulas_of_honest_size_may_be_evaluated():
    for formula in ("3 + 5 + 7", "(3 + 4) * 5 / 2", "-34*x**8/15 - 5*x/4 + C", "2*exp(3*x)"):
        assert scorer_refusal_reason(formula) == "", formula
    for task in ("countdown", "puzzle24", "polynomial_multiplication", "simple_integration"):
        for item in entries(task, 8):
            if item["answer"]:
                assert scorer_refusal_reason(item["answer"]) == "", item["answer"]


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
    unread = grade("two and seven", "prime_factorization", entry)
    assert unread.reward == 0 and unread.is_graded
    with pytest.raises(ValueError, match="two"):
        reward("prime_factorization", {**entry, "answer": "two"}, "2 x 7")


@pytest.mark.parametrize("task", sorted(GUARDS))
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
            given = grade(answer, task, entry)
            assert given.reward < 1 and given.is_graded, (given, answer[:10])


def test_a_task_that_cannot_be_graded_is_named():
    with pytest.raises(ValueError, match="'composite'"):
        reward("composite", {"answer": "1", "metadata": {}}, "1")
    with pytest.raises(ValueError, match="'chain_summ'"):
        grade("3", "chain_summ")
    with pytest.raises(ValueError, match="chain_sum.*'answer'.*'metadata'"):
        grade("3", entry={"answer": "3"})
