"""Which answers are kept: against brute force, and case by case."""

import asyncio
import random
import re
from pathlib import Path

import pytest
import yaml
from r1_grading import Grade
from sample_answers import PROMPT, answer, run_decide, selection

from megatron_r1.config import parse_recipe
from megatron_r1.config.sample import RenderConfig
from megatron_r1.data.prompt import make_prompt
from megatron_r1.evaluation.text_response_grader import TextResponseGrader
from megatron_r1.sample.sft_examples import Rendering, SFTKeeper

ROOT = Path(__file__).parents[3]
PLAIN = Rendering(RenderConfig(), "Q: {question}\nA:", "")


def kept(responses, keep, filters=None, output="responses", seed=0, prompt=PROMPT):
    decide = SFTKeeper(selection(keep, output, filters, seed), PLAIN)
    return run_decide(decide, responses, prompt)


def by_brute_force(responses, keep, order):
    """The decisions, from the words of docs/sample.md."""
    correct = [c for c in responses if c.rewards["accuracy"] >= keep["min_accuracy"]]
    rate = len(correct) / len(responses)
    if rate > keep["max_pass_rate"]:
        return {c.index: "too_easy" for c in responses}
    if rate < keep["min_pass_rate"]:
        return {c.index: "too_hard" for c in responses}
    found = {}
    for c in responses:
        if c not in correct:
            found[c.index] = "wrong"
        elif c.reward < keep["min_reward"]:
            found[c.index] = "low_reward"
        elif c.is_truncated:
            found[c.index] = "truncated"
        elif any(c.text == d.text and d.index not in found for d in responses[: c.index]):
            found[c.index] = "duplicate"
    left = sorted((c for c in responses if c.index not in found), key=order)
    for place, c in enumerate(left):
        found[c.index] = "kept" if place < (keep["per_prompt"] or 99) else "not_chosen"
    return found


ORDERS = {
    "first": lambda c: c.index,
    "shortest": lambda c: (c.num_tokens, c.index),
    "best": lambda c: (-c.reward, c.index),
}


@pytest.mark.parametrize("choose", ORDERS)
@pytest.mark.parametrize("per_prompt", [None, 1, 2])
def test_selection_is_what_brute_force_finds(choose, per_prompt):
    draw = random.Random(f"{choose}{per_prompt}")
    seen = set()
    for _ in range(300):
        responses = [
            answer(
                i,
                accuracy=draw.choice([0.0, 0.5, 1.0, 1.0]),
                reward=draw.choice([0.9, 1.0, 1.1]),
                text=f"text {draw.randrange(4)}",
                num_tokens=draw.randrange(1, 4),
                is_truncated=draw.random() < 0.2,
            )
            for i in range(draw.randrange(1, 6))
        ]
        keep = {
            "min_accuracy": draw.choice([0.5, 1.0]),
            "min_reward": draw.choice([0.0, 1.0]),
            "min_pass_rate": draw.choice([0.0, 0.3]),
            "max_pass_rate": draw.choice([0.7, 1.0]),
            "per_prompt": per_prompt,
        }
        expected = by_brute_force(responses, keep, ORDERS[choose])
        switched_on = {"truncated": True, "duplicate": True}
        found, rows = kept(responses, {**keep, "choose": choose}, switched_on)
        assert found == expected, (keep, responses)
        assert len(rows) == list(expected.values()).count("kept")
        seen |= set(expected.values())
    chosen = {"not_chosen"} if per_prompt else set()
    assert seen >= {"kept", "wrong", "low_reward", "truncated", "duplicate", "too_easy", "too_hard"}
    assert seen >= chosen


def test_random_depends_on_seed_and_question_alone():
    responses = [answer(i, text=f"text {i}") for i in range(8)]

    def chosen(seed, question):
        prompt = make_prompt(question, "math", "42", {})
        keep = {"per_prompt": 2, "choose": "random"}
        found, _ = kept(responses, keep, seed=seed, prompt=prompt)
        return frozenset(i for i, code in found.items() if code == "kept")

    assert chosen(0, "a") == chosen(0, "a")
    several = {chosen(seed, question) for seed in range(5) for question in "abcde"}
    assert len(several) > 10  # of 25 draws among 28 pairs; 17 are to be expected
    counts = [sum(i in pair for pair in (chosen(s, "a") for s in range(200))) for i in range(8)]
    # 50 of 200 each, standard deviation 6.1.
    assert all(20 < count < 80 for count in counts), counts


def test_no_response_and_no_grade_are_no_opinion_of_the_question():
    refused = answer(0, None, text="", refusal="the prompt has 99 tokens")
    ungraded = answer(1, None, reason="cannot be graded: no sandbox", is_ungraded=True)
    correct, incorrect = answer(2), answer(3, 0.0)
    # Of the two that are graded one is right: 50 %.
    found, _ = kept([refused, ungraded, correct, incorrect], {"max_pass_rate": 0.5})
    assert found == {0: "no_response", 1: "ungraded", 2: "kept", 3: "wrong"}
    found, _ = kept([refused, ungraded, correct, incorrect], {"max_pass_rate": 0.49})
    assert found == {0: "no_response", 1: "ungraded", 2: "too_easy", 3: "too_easy"}


def test_what_spells_the_same_is_a_duplicate():
    texts = ["It is 42.", "it  is\n４２.", "It is 42!", "It is 42."]
    found, _ = kept([answer(i, text=t) for i, t in enumerate(texts)], {}, {"duplicate": True})
    assert found == {0: "kept", 1: "duplicate", 2: "kept", 3: "duplicate"}
    powers = [answer(i, text=t) for i, t in enumerate(["x² + 1", "x2 + 1", "x₂ + 1"])]
    assert set(kept(powers, {}, {"duplicate": True})[0].values()) == {"kept"}
    # The same as an answer that is wrong is no duplicate of anything that is kept.
    twice = [answer(0, 0.0, text="a"), answer(1, text="a")]
    assert kept(twice, {}, {"duplicate": True})[0] == {0: "wrong", 1: "kept"}


def test_without_grades_only_filters_decide():
    responses = [answer(0, None), answer(1, None, is_truncated=True)]
    assert kept(responses, None, output="sft")[0] == {0: "kept", 1: "truncated"}


def test_answers_without_grades_can_be_chosen_from_as_well():
    responses = [answer(i, None, num_tokens=n) for i, n in enumerate((9, 5, 7))]
    keep = {"min_accuracy": None, "per_prompt": 2, "choose": "shortest"}
    assert kept(responses, keep)[0] == {0: "not_chosen", 1: "kept", 2: "kept"}


@pytest.mark.parametrize(("weight", "is_graded"), [(0.0, True), (0.5, False)])
def test_a_reward_that_is_only_measured_may_fail(weight, is_graded):
    """As in training, where it takes no part in the sum."""

    class Pool:
        async def grade(self, kind, response, truth, **fields):
            failed = kind == "repetition"
            return Grade.ungraded("broken") if failed else Grade(1.0, "right")

    weights = {"accuracy": 1.0, "repetition": weight}
    grader = TextResponseGrader(Pool(), weights, {})
    graded = asyncio.run(grader.grade(PROMPT, answer(0, None)))
    assert graded.is_ungraded != is_graded
    assert graded.reward == (1.0 if is_graded else None)


def test_a_blank_answer_is_nothing_to_learn_whatever_its_reward():
    blank = answer(0, text=" \n\t")
    assert kept([blank, answer(1)], {}) == ({0: "empty", 1: "kept"}, kept([answer(1)], {})[1])


def test_rows_are_what_sft_reads_in_the_order_of_choice():
    responses = [answer(0, num_tokens=9), answer(1, num_tokens=5), answer(2, num_tokens=7)]
    _, rows = kept(responses, {"choose": "shortest", "per_prompt": 2})
    assert [row["response"] for row in rows] == [responses[1].text, responses[2].text]
    assert {row["prompt"] for row in rows} == {"Q: What is 6 x 7?\nA:"}
    assert {(row["id"], row["kind"]) for row in rows} == {(PROMPT.id, "math")}


def test_the_recipes_in_the_documentation_are_valid():
    page = (ROOT / "docs/sample.md").read_text(encoding="utf-8")
    recipes = re.findall(r"```yaml\n# (\w+)\.yaml\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in recipes] == ["collect", "rejection", "sft", "pairs", "labels"]
    for name, text in recipes:
        tree = yaml.safe_load(text)
        assert parse_recipe(tree, name).run.folder
