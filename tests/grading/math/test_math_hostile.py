"""Answers made to hang, crash or fool the math grader, through the worker pool.

A worker's memory is bounded, and its time by a limit that no honest machine reaches: what would
hang is ended by it and counted. What is asserted is what a run needs: no reward, and the next
honest answer is graded.
"""

import asyncio

import pytest
from r1_grading import RewardPool
from r1_grading import math as math_reward
from r1_grading.math.normalization import normalize_latex
from r1_grading.math.refusal import parser_refusal_reason
from r1_grading.reading import READINGS

from tools.bench.rewards import samples
from tools.bench.rewards.pool import TRUTHS, soak_samples

FAMILIES = {
    "towers": samples.TOWERS,
    "nested": samples.NESTED,
    "regular expressions": samples.REGEXES,
    "undefined": samples.UNDEFINED,
    "code": samples.HOSTILE_CODE,
    "prompts": samples.HOSTILE_PROMPTS,
    "look-alikes": samples.LOOK_ALIKES,
    "giants": samples.GIANTS,
}
# Quadratic matching takes many minutes on each.
HOPELESS = ("$" * 10**6, "answer is " * 10**5, r"\boxed{" * 10**5, "(" * 10**6)
LONG = (" " * 200_000 + "x", "$ " * 100_000, "1" * 200_000, "1," * 900)
HONEST = (r"<answer>2\sqrt{3}</answer>", r"\sqrt{12}")


def answered(answer):
    return f"<think>…</think><answer>{answer}</answer>"


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Of one worker of 1 GiB: batch → the grades of its jobs, the counters and a file's path.

    The grades have that of an honest answer after the jobs; the file is the one that code in
    answers would make."""
    trace = tmp_path_factory.mktemp("code") / "trace"
    batches = {
        family: [
            (answered(answer.replace("{trace}", str(trace))), truth)
            for number, answer in enumerate(answers.values())
            for truth in truths_of(number)
        ]
        for family, answers in FAMILIES.items()
    }
    batches["hopeless"] = [(response, 13) for response in HOPELESS]
    batches["honest"] = [(s.response, s.truth) for s in honest_samples()]

    async def run():
        async with RewardPool(1, timeout_seconds=300.0, memory_limit_bytes=2**30) as pool:
            results = {}
            for name, jobs in batches.items():
                grades = await asyncio.gather(*(pool.grade("math", *job) for job in jobs))
                results[name] = grades, await pool.grade("math", *HONEST)
            long = [
                pool.grade("math", text, 13, reading=reading, reads_last_line=True)
                for text in LONG
                for reading in READINGS
            ]
            await asyncio.gather(*long)
            return results, pool.snapshot()

    return *asyncio.run(run()), trace


def truths_of(number):
    """A number, and two other kinds of truths, which every family meets in turn."""
    return sorted({TRUTHS[0], *(TRUTHS[(number + step) % len(TRUTHS)] for step in (1, 4))})


def honest_samples():
    return [sample for sample in soak_samples(300, seed=3) if sample.kind == "math"]


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("family", [*FAMILIES, "hopeless"])
def test_hostile_answers_get_nothing_and_the_next_honest_one_its_reward(family, graded):
    grades, honest = graded[0][family]
    assert [grade.reason for grade in grades if grade.reward != 0.0] == []
    assert honest.reward == 1.0


def test_hostile_answers_are_recognized_before_a_parser_has_them(graded):
    _, counts, trace = graded
    assert counts["timeouts"] == counts["crashes"] == counts["out_of_memory"] == 0
    assert not trace.exists()  # no answer ran as code


def test_the_same_answers_get_the_same_rewards_after_hostile_ones(graded):
    grades, _ = graded[0]["honest"]
    assert [grade.reward for grade in grades] == [sample.reward for sample in honest_samples()]


SLOW_BRACES = pytest.param("ten megabytes of braces", marks=pytest.mark.more)
PLACES = [name for name in samples.HOSTILE_RESPONSES if name != "ten megabytes of braces"]


@pytest.mark.parametrize("name", [*PLACES, SLOW_BRACES])
def test_an_answer_in_the_wrong_place_is_none(name):
    truths = ("13", "answer here", r"\boxed{13}", "12")
    for truth in truths[: 1 if "megabytes" in name else None]:
        assert math_reward.grade(samples.HOSTILE_RESPONSES[name], truth).reward == 0.0, truth


@pytest.mark.more
def test_what_is_not_recognized_costs_one_time_limit_and_a_worker(monkeypatch, tmp_path):
    # Without the refusals, which this test stands in for: the next trick that nobody knows yet.
    # Only that answer has a short limit; its end without one takes hours.
    (tmp_path / "unguarded.py").write_text(
        "from r1_grading import math\n"
        "from r1_grading.math import comparison\n"
        "assert comparison.parser_refusal_reason\n"
        "comparison.parser_refusal_reason = lambda expected, answer: None\n"
        "grade = math.grade\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def run():
        async with RewardPool(1, timeout_seconds=0.5) as pool:
            tower = await pool.grade(
                "unguarded:grade", answered(r"\binom{999999999}{499999999}"), "n"
            )
            pool.timeout_seconds = 300.0
            honest = await pool.grade("unguarded:grade", answered("13"), 13)
            return tower, honest, pool.snapshot()

    tower, honest, counts = asyncio.run(run())
    assert (tower.reward, honest.reward) == (0.0, 1.0)
    assert counts["timeouts"] + counts["out_of_memory"] == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("9^{9^{9}}", "too large"),
        ("9**9**9", "too large"),
        (r"\int_0^1 x dx", "left open"),
        ("2 + 11", "left open"),
        (r"\log_2 8", "logarithm"),
        ("2^{10}", "power"),
        ("(" * 30 + "x" + ")" * 30, "30 deep"),
        ("x^{" * 6 + "x" + "}" * 6, "6 deep"),
        ("x_1_2", "index"),
        ("(1", "close"),
        ("1\u200b3", "no mathematics"),
    ],
)
def test_a_refusal_says_which_rule_refuses(answer, reason):
    assert reason in (parser_refusal_reason("13", normalize_latex(answer)) or "")
    assert "refused" in math_reward.grade(answered(answer), 13).reason


def test_honest_answers_are_not_refused():
    honest = (
        *("2024^{2024}", "2^{2^5}", "10^{100}", "2004!", r"\binom{2024}{12}", "e^{-x^2/2}"),
        *(r"\frac{1}{1+\frac{1}{2}}", "x^{y^{z}}", "((1+2))", r"\sqrt{2+\sqrt{2+\sqrt{2}}}"),
        *("-5", r"3 \times 10^{8}", r"x_1^2", r"{9}^{2}", "90°"),
    )
    for answer in honest:
        assert parser_refusal_reason(normalize_latex(answer), normalize_latex(answer)) is None, (
            answer
        )
    assert parser_refusal_reason(r"\int_0^1 f", r"2 \int_0^1 f") is None
