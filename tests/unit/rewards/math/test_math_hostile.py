"""Answers made to hang, crash or fool the math grader, through the worker pool.

Every scenario is bounded: a grade by the pool's limit, a worker's memory by its own, the whole by
`within`. What is asserted is what a run needs: no reward, and the next honest answer is graded.
"""

import asyncio

import pytest

from megatron_r1.rewards import math as math_reward
from megatron_r1.rewards.math.refusal import refusal
from megatron_r1.rewards.math.spelling import spell
from megatron_r1.rewards.runtime.pool import RewardPool
from tools.bench.rewards import TRUTHS, hostile, soak_samples

FAMILIES = {
    "towers": hostile.TOWERS,
    "nested": hostile.NESTED,
    "regular expressions": hostile.REGEXES,
    "undefined": hostile.UNDEFINED,
    "code": hostile.CODE,
    "prompts": hostile.PROMPTS,
    "look-alikes": hostile.LOOK_ALIKES,
    "giants": hostile.GIANTS,
}


HONEST = (r"<answer>2\sqrt{3}</answer>", r"\sqrt{12}")


def grade_all(batches, *, within=240.0):
    """For each batch of (response, truth) jobs its grades and that of an honest answer after it, by
    one worker of 1 GiB; and the pool's counters at the end."""

    async def run():
        async with (
            asyncio.timeout(within),
            RewardPool(1, timeout_seconds=10.0, memory_limit_bytes=2**30) as pool,
        ):
            results = []
            for jobs in batches:
                grades = await asyncio.gather(*(pool.grade("math", *job) for job in jobs))
                results.append((grades, await pool.grade("math", *HONEST)))
            return results, pool.snapshot()

    return asyncio.run(run())


def answered(answer):
    return f"<think>…</think><answer>{answer}</answer>"


@pytest.fixture(scope="module")
def graded():
    """Every family's (name, truth) → grade, the honest grade after it, and the counters."""
    batches = [
        [(answered(answer), truth) for answer in answers.values() for truth in TRUTHS]
        for answers in FAMILIES.values()
    ]
    results, counts = grade_all(batches)
    graded = {}
    for (family, answers), (grades, honest) in zip(FAMILIES.items(), results, strict=True):
        names = [(name, truth) for name in answers for truth in TRUTHS]
        graded[family] = dict(zip(names, grades, strict=True)), honest
    return graded, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_answers_get_nothing_and_the_next_honest_one_its_reward(family, graded):
    grades, honest = graded[0][family]
    assert {name: grade.reason for name, grade in grades.items() if grade.reward != 0.0} == {}
    assert honest.reward == 1.0


def test_hostile_answers_are_recognized_before_a_parser_has_them(graded):
    counts = graded[1]
    # A loaded machine may run into the time limit here and there; a hole would do so seven times.
    assert counts["timeouts"] < len(TRUTHS)
    assert counts["crashes"] == counts["out_of_memory"] == 0


@pytest.mark.parametrize("name", hostile.RESPONSES)
def test_an_answer_in_the_wrong_place_is_none(name):
    truths = ("13", "answer here", r"\boxed{13}", "12")
    for truth in truths[: 1 if "megabytes" in name else None]:
        assert math_reward.grade(hostile.RESPONSES[name], truth).reward == 0.0, truth


def test_no_answer_runs_as_code(tmp_path):
    trace = tmp_path / "trace"
    jobs = [
        (answered(code.replace("{trace}", str(trace))), truth)
        for code in hostile.CODE.values()
        for truth in TRUTHS
    ]
    ((grades, _),), _ = grade_all([jobs])
    assert {grade.reward for grade in grades} == {0.0}
    assert not trace.exists()


def test_what_is_not_recognized_costs_one_time_limit_and_a_worker(monkeypatch, tmp_path):
    # Without the refusals, which this test stands in for: the next trick that nobody knows yet.
    (tmp_path / "unguarded.py").write_text(
        "from megatron_r1.rewards import math\n"
        "from megatron_r1.rewards.math import comparison\n"
        "comparison.refusal = lambda expected, answer: None\n"
        "grade = math.grade\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def run():
        async with asyncio.timeout(120), RewardPool(1, timeout_seconds=1.5) as pool:
            tower = await pool.grade(
                "unguarded:grade", answered(r"\binom{999999999}{499999999}"), "n"
            )
            honest = await pool.grade("unguarded:grade", answered("13"), 13)
            return tower, honest, pool.snapshot()

    tower, honest, counts = asyncio.run(run())
    assert (tower.reward, honest.reward) == (0.0, 1.0)
    assert counts["timeouts"] + counts["out_of_memory"] == 1


def test_refusals_say_why():
    reasons = {
        "9^{9^{9}}": "too large",
        "9**9**9": "too large",
        r"\int_0^1 x dx": "left open",
        "2 + 11": "left open",
        r"\log_2 8": "left open: a logarithm",
        "2^{10}": "left open: a power",
        "(" * 30 + "x" + ")" * 30: "nested 30 deep",
        "x^{" * 6 + "x" + "}" * 6: "nested 6 deep",
        "x_1_2": "index on an index",
        "(1": "do not close",
        "1\u200b3": "no mathematics",
    }
    for answer, reason in reasons.items():
        assert reason in (refusal("13", spell(answer)) or ""), answer
        assert "refused" in math_reward.grade(answered(answer), 13).reason


def test_honest_answers_are_not_refused():
    honest = (
        *("2024^{2024}", "2^{2^5}", "10^{100}", "2004!", r"\binom{2024}{12}", "e^{-x^2/2}"),
        *(r"\frac{1}{1+\frac{1}{2}}", "x^{y^{z}}", "((1+2))", r"\sqrt{2+\sqrt{2+\sqrt{2}}}"),
        *("-5", r"3 \times 10^{8}", r"x_1^2", r"{9}^{2}", "90°"),
    )
    for answer in honest:
        assert refusal(spell(answer), spell(answer)) is None, answer
    assert refusal(r"\int_0^1 f", r"2 \int_0^1 f") is None


def test_the_same_answers_get_the_same_rewards_after_hostile_ones():
    batch = soak_samples(300, seed=3)
    jobs = [(sample.response, sample.truth) for sample in batch if sample.kind == "math"]
    ((grades, honest),), _ = grade_all([jobs])
    expected = [sample.reward for sample in batch if sample.kind == "math"]
    assert [grade.reward for grade in grades] == expected
    assert honest.reward == 1.0
