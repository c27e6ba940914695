"""The graders themselves, called in this process."""

import contextlib
import inspect
import io
import json

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.errors import UserError
from megatron_r1.rewards import FORM_REWARDS, REGISTRY, Grade, resolve
from megatron_r1.rewards import format as format_reward
from megatron_r1.rewards import logic as logic_reward
from megatron_r1.rewards.answer import extract, final_answers, last_boxed, unwrap
from megatron_r1.rewards.combine import combine
from megatron_r1.rewards.logic.formula import is_formula, refusal
from megatron_r1.user_code import find_function

GOOD = "<think>2 + 11</think><answer>13</answer>"


def test_a_grade_is_a_number_between_0_and_1():
    assert Grade(1, "fine").reward == 1.0
    for reward in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Grade(reward, "?")


def test_a_reason_is_one_short_line():
    reason = Grade(0.0, "a\nb " + "x" * 10_000).reason
    assert reason.startswith("a b x") and len(reason) <= 500


def test_an_unknown_kind_names_the_nearest_and_a_path_stands_for_itself():
    assert resolve("math") == REGISTRY["math"]
    assert resolve("mine.rewards:brevity") == "mine.rewards:brevity"
    for kind, hint in {
        "maths": "; did you mean 'math'[?] .known: code, ",
        "Format": "; did you mean 'format'[?] .known: ",
        "accuracy": "'accuracy' .known: code, ",  # nothing is near, so nothing is guessed
        "a b:c": "'a b:c' .known: .* your own is written 'package.module:function'",
    }.items():
        with pytest.raises(ValueError, match=hint):
            resolve(kind)


def test_the_kind_of_an_environment_is_known_but_is_no_reward():
    with pytest.raises(UserError, match="only a run with `agents` grades the kind 'environment'"):
        find_function(resolve("environment"))("13", "13", level=3)


@pytest.mark.parametrize("kind", FORM_REWARDS)
def test_a_reward_of_the_form_needs_no_truth(kind):
    parameters = inspect.signature(find_function(FORM_REWARDS[kind])).parameters
    assert parameters["truth"].default is None


@pytest.mark.parametrize("response", [GOOD, f"\n {GOOD}\n", GOOD.replace("><", ">\n\n<")])
def test_the_asked_format_gets_1(response):
    assert format_reward.grade(response).reward == 1.0


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "<think> occurs 0"),
        ("13", "<think> occurs 0"),
        ("2 + 11</think><answer>13</answer>", "<think> occurs 0"),
        ("<think>2 + 11<answer>13</answer>", "</think> occurs 0"),
        ("<think>2 + 11</think>13", "<answer> occurs 0"),
        ("<think>2 + 11</think><answer>13", "</answer> occurs 0"),
        (GOOD + GOOD, "<think> occurs 2"),
        (GOOD + "<answer>14</answer>", "<answer> occurs 2"),
        ("<think><answer>13</answer></think>", "order"),
        ("<answer>13</answer><think>2 + 11</think>", "order"),
        ("so: " + GOOD, "outside"),
        (GOOD + ".", "outside"),
        (GOOD.replace("><", ">so<"), "outside"),
        ("<Think>2 + 11</Think><answer>13</answer>", "<think> occurs 0"),
    ],
)
def test_any_other_format_gets_0_and_the_reason(response, reason):
    grade = format_reward.grade(response)
    assert grade.reward == 0.0 and reason in grade.reason


def test_a_thought_opened_by_the_prompt_must_not_be_opened_again():
    assert format_reward.grade("2 + 11</think><answer>13</answer>", opened=True).reward == 1.0
    assert format_reward.grade(GOOD, opened=True).reward == 0.0


@pytest.mark.parametrize(
    ("response", "options", "answer"),
    [
        (GOOD, {}, "13"),
        ("<answer>13</answer>", {}, "13"),
        ("<answer> 13\n</answer> and so on", {}, "13"),
        (r"so \boxed{\frac{1}{2}}.", {}, r"\frac{1}{2}"),
        (r"\boxed{12}, no: \boxed{\sqrt{\frac{3}{4}}}", {}, r"\sqrt{\frac{3}{4}}"),
        (r"\boxed{12} or $\boxed{13}$", {}, "12, 13"),
        (r"\boxed{13}\quad\text{and}\quad\boxed{13}", {}, "13"),
        ("so\n\\[\nx = 13\n\\]\n", {"plain_line": True}, "\\[\nx = 13\n\\]"),
        (r"\boxed{\{1, 2\}}", {}, r"\{1, 2\}"),
        (r"<think>\boxed{12}</think>\boxed{13}", {}, "13"),
        ("<think><answer>12</answer></think><answer>13</answer>", {}, "13"),
        ("thinking</think><answer>13</answer>", {"opened": True}, "13"),
        ("so\n13\n\n", {"plain_line": True}, "13"),
        ("13", {"plain_line": True}, "13"),
        ("13", {}, None),
        ("", {"plain_line": True}, None),
        ("<answer></answer>", {}, None),
        ("<answer> 13", {}, None),
        ("13 </answer>", {}, None),
        ("</answer>13<answer>", {}, None),
        ("<answer>12</answer><answer>13</answer>", {}, None),
        ("<answer>12<answer>13</answer></answer>", {}, None),
        ("<think><answer>13</answer></think>", {}, None),
        ("<think><answer>13</answer>", {}, None),
        ("<answer>13</answer><think>", {}, None),
        ("<answer>13</answer>", {"opened": True}, None),
        (r"<think>\boxed{13}", {"plain_line": True}, None),
        (r"\boxed{13", {}, None),
        (r"\boxed{}", {}, None),
    ],
)
def test_the_answer_is_what_the_response_commits_to(response, options, answer):
    assert extract(response, **options).text == answer


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
        assert unwrap(decorated) == "13"
    assert unwrap(r"\text{north}") == "north"
    assert unwrap(r"\text{a} + \text{b}") == r"\text{a} + \text{b}"
    assert unwrap("$1$ or $2$") == "$1$ or $2$"


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


def test_logic_uses_the_scorer_of_the_task():
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    answer = entry["answer"]
    fields = {"task": "chain_sum", "entry": entry}
    right = logic_reward.grade(f"<answer>{answer}</answer>", None, **fields)
    wrong = logic_reward.grade("<answer>no idea</answer>", None, **fields)
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert wrong.reason == f"wrong: no idea, expected {answer}"


def test_partial_credit_is_0_unless_asked_for():
    entry = {"question": "4 - 1 =", "answer": "3", "metadata": {}}
    fields = {"task": "chain_sum", "entry": entry}
    # chain_sum's scorer gives len(truth) / len(answer) where the answer contains the truth.
    assert logic_reward.grade("<answer>it's 3</answer>", None, **fields).reward == 0.0
    partial = logic_reward.grade("<answer>it's 3</answer>", None, exact=False, **fields)
    assert partial.reward == pytest.approx(1 / 6)


@pytest.mark.parametrize("task", ["arc_agi", "rearc", "countdown", "n_queens", "number_sorting"])
def test_an_entry_that_travelled_as_json_scores_the_same(task):
    item = reasoning_gym.create_dataset(task, size=1, seed=5)[0]
    entry = json.loads(json.dumps(item))
    grade = logic_reward.grade(f"<answer>{item['answer']}</answer>", None, task=task, entry=entry)
    assert grade.reward == 1.0, grade.reason


def test_logic_errors_name_the_task_and_what_is_missing():
    entry = {"question": "?", "answer": "3", "metadata": {}}
    with pytest.raises(ValueError, match="no task 'chain_summ'"):
        logic_reward.grade("<answer>3</answer>", None, task="chain_summ", entry=entry)
    with pytest.raises(ValueError, match="needs 'answer' and 'metadata'"):
        logic_reward.grade("<answer>3</answer>", None, task="chain_sum", entry={"answer": "3"})


@pytest.mark.parametrize("template", ["open({!r}, 'w')", "__import__('os').mkdir({!r})"])
def test_no_scorer_runs_the_answer_as_code(template, tmp_path):
    trace = tmp_path / "trace"
    response = f"<answer>{template.format(str(trace))}</answer>"
    for task in sorted(DATASETS.keys() - {"composite"}):
        entry = reasoning_gym.create_dataset(task, size=1, seed=5)[0]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            assert logic_reward.grade(response, None, task=task, entry=entry).reward == 0.0, task
        assert not trace.exists(), task


def test_formulas_are_told_from_programs():
    for formula in ("(3 + 4) * 5", "-34*x**8/15 - 5*x/4 + C", "sin(x)^2 + 2x", "1.5*exp(X)"):
        assert is_formula(formula), formula
    for program in ("open(1)", "x.y", "eval (x)", "S('1')", "x__y", "[1]", "ｅｖａｌ(1)", "x2"):
        assert not is_formula(program), program


@pytest.mark.parametrize(
    "formula",
    [
        "3+5+7+0*9**9**9",
        "9^9^9",
        "(x + y)**(9**9)",
        "((x + 1)**60)**60",
        "2**-9**9",
        "2**(10**5)",
        "exp(exp(exp(9)))",
        "1*" * 900 + "9**9**" * 30 + "9",
        "(" * 900 + "1" + ")" * 900,
        "09**9**9",
    ],
)
def test_no_scorer_evaluates_what_is_too_large(formula):
    entry = {"answer": None, "metadata": {"numbers": [3, 5, 7], "target": 15}}
    grade = logic_reward.grade(f"<answer>{formula}</answer>", task="countdown", entry=entry)
    assert grade.reward == 0.0 and grade.reason.startswith("refused"), grade.reason


def test_formulas_of_honest_size_may_be_evaluated():
    for formula in ("3 + 5 + 7", "(3 + 4) * 5 / 2", "-34*x**8/15 - 5*x/4 + C", "2*exp(3*x)"):
        assert refusal(formula) == "", formula
    for task in ("countdown", "puzzle24", "polynomial_multiplication", "simple_integration"):
        data = reasoning_gym.create_dataset(task, size=20, seed=5)
        for item in data:
            if item["answer"]:
                assert refusal(item["answer"]) == "", item["answer"]


@pytest.mark.parametrize("form", [r"\boxed{3}", "$3$", r"$\boxed{3}$", "$$3$$", r"\fbox{ 3 }"])
def test_logic_reads_an_answer_in_a_box_or_dollar_signs(form):
    entry = {"question": "4 - 1 =", "answer": "3", "metadata": {}}
    fields = {"task": "chain_sum", "entry": entry}
    assert logic_reward.grade(f"<answer>{form}</answer>", **fields).reward == 1.0
    assert logic_reward.grade(f"<answer>2 {form}</answer>", **fields).reward == 0.0
    assert logic_reward.grade("<answer>$3$ $4$</answer>", **fields).reward == 0.0


def test_terms_are_weighted_and_named():
    grades = {"accuracy": Grade(1.0, "correct: 13"), "format": Grade(1.0, "format as asked")}
    assert combine(grades).total == pytest.approx(1.1)
    assert combine(grades).terms == {"accuracy": 1.0, "format": 1.0}
    assert combine(grades).reason == "correct: 13; format as asked"
    assert combine(grades, {"accuracy": 0.5}).total == 0.5
    with pytest.raises(ValueError, match="names 'language', which was not graded"):
        combine(grades, {"language": 1.0})
