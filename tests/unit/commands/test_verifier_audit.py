"""The audit of a verifier, with errors of a known rate planted into its verdicts."""

import asyncio
import random
from array import array
from math import comb, sqrt
from types import SimpleNamespace

import pytest
from r1_grading import Grade
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.score.verifier_audit import audit_verifier, logged_responses
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.sample_log import decode, encode, from_record, to_record
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response
from megatron_r1.evaluation.second_verdicts import PooledSecondReader, classify_verdict
from megatron_r1.evaluation.verifier_errors import (
    AnswerContent,
    AuditedResponse,
    SecondReaderVerdict,
    draw_sample,
    group_by_stratum,
)


def responses_with(errors, *, num=900, group_size=6, source=lambda place: "a"):
    """Graded responses and which of their verdicts are wrong: those of `errors(place, label)`."""
    rng = random.Random(5)
    responses, wrong = [], set()
    for number in range(num):
        place, label = f"line {number}", rng.random() < 0.4
        is_wrong = errors(number, label)
        reward = float(label != is_wrong)
        content = AnswerContent("", "13", {})
        responses.append(
            AuditedResponse(
                place,
                source(number),
                "math",
                f"group {number // group_size}",
                reward,
                reward,
                lambda content=content: content,
            )
        )
        if is_wrong:
            wrong.add(place)
    return responses, wrong


def reader_with(wrong, undecided=()):
    async def read(response):
        outcome = "wrong" if response.id in wrong else "confirmed"
        return SecondReaderVerdict("undecided" if response.id in undecided else outcome, "")

    return read


def true_fraction(responses, wrong, is_accepted, source=None):
    of = [a for a in responses if a.is_accepted is is_accepted and source in (None, a.source)]
    return sum(response.id in wrong for response in of) / len(of)


def least_covered(trials, rate=0.95, alpha=1e-3):
    """The smallest count of `trials` that a rate of coverage of 95% makes likelier than alpha."""
    total = 0.0
    for count in range(trials + 1):
        total += comb(trials, count) * rate**count * (1 - rate) ** (trials - count)
        if total > alpha:
            return count


PLANTED = {
    "none": lambda number, label: False,
    "one in fifty refusals": lambda number, label: label and number % 50 == 0,
    "all fractions rejected": lambda number, label: label and number % 4 == 0,
    "the empty answer accepted": lambda number, label: not label and number % 9 == 0,
    "both": lambda number, label: number % 7 == 0,
    "one source only": lambda number, label: number % 3 == 0 and number % 2 == 0,
}


@pytest.mark.parametrize("num_seeds", [60, pytest.param(400, marks=pytest.mark.more)])
@pytest.mark.parametrize("errors", PLANTED.values(), ids=PLANTED)
def test_intervals_cover_planted_rates_about_as_often_as_they_say(errors, num_seeds):
    responses, wrong = responses_with(errors, source=lambda number: "ab"[number % 3 == 0])
    # Some that the second reader cannot decide.
    undecided = {response.id for response in responses[::29]}
    second_reader = reader_with(wrong, undecided)
    truths = {
        (source, is_accepted): true_fraction(responses, wrong, is_accepted, source)
        for source in ("a", "b", None)
        for is_accepted in (False, True)
    }
    covered = dict.fromkeys(truths, 0)
    for seed in range(num_seeds):
        result = asyncio.run(
            audit_verifier(responses, second_reader, size=120, seed=seed, num_groups=0)
        )
        for source, rates in (*result.sources.items(), (None, result.overall)):
            for is_accepted, fraction in (
                (False, rates.wrongly_rejected),
                (True, rates.wrongly_accepted),
            ):
                covered[source, is_accepted] += (
                    fraction.low <= truths[source, is_accepted] <= fraction.high
                )
                assert fraction.high - fraction.low < 0.6
                assert fraction.num_sampled in (30, 60)
    for key, count in covered.items():
        assert count >= least_covered(num_seeds), (key, count)


def test_a_planted_fault_is_told_from_none():
    """A quarter of right answers rejected: the lower end is above 0 for every seed."""
    responses, wrong = responses_with(PLANTED["all fractions rejected"])
    for seed in range(50):
        result = asyncio.run(
            audit_verifier(responses, reader_with(wrong), size=100, seed=seed, num_groups=0)
        )
        assert result.overall.wrongly_rejected.low > 0, seed
        assert result.overall.wrongly_accepted.low == 0, seed


@pytest.mark.parametrize(
    ("is_accepted", "math_verify", "sampled_values", "outcome"),
    [
        (True, "right", "right", "confirmed"),
        (True, "right", "unsure", "confirmed"),
        (True, "wrong", "right", "confirmed"),
        (True, "wrong", "wrong", "wrong"),
        (True, "wrong", "unsure", "undecided"),
        (True, "right", "wrong", "undecided"),
        (True, "unsure", "wrong", "undecided"),
        (True, "unsure", "unsure", "undecided"),
        (False, "wrong", "wrong", "confirmed"),
        (False, "right", "right", "wrong"),
        (False, "right", "wrong", "confirmed"),
        (False, "right", "unsure", "undecided"),
    ],
)
def test_a_verdict_is_wrong_only_where_both_readings_contradict_it(
    is_accepted, math_verify, sampled_values, outcome
):
    assert classify_verdict(is_accepted, math_verify, sampled_values) == outcome


def test_a_draw_takes_as_many_of_each_stratum_and_small_ones_whole():
    responses, _ = responses_with(PLANTED["none"], source=lambda number: "ab"[number < 12])
    strata = group_by_stratum(responses)
    assert {key[0] for key in strata} == {"a", "b"}
    drawn = draw_sample(strata, 100, seed=1)
    sizes = {key: len(some) for key, some in drawn.items()}
    small = {key: len(strata[key]) for key in strata if key[0] == "b"}
    assert {key: sizes[key] for key in small} == small
    assert sum(sizes.values()) == 100
    large = [sizes[key] for key in sizes if key[0] == "a"]
    assert max(large) - min(large) <= 1
    assert draw_sample(strata, 100, seed=1) == drawn != draw_sample(strata, 100, seed=2)
    places = [response.id for some in drawn.values() for response in some]
    assert len(set(places)) == 100
    with refused("--size", Cause.OUT_OF_RANGE, 3, 4):
        draw_sample(strata, 3, seed=1)


def logged(reward, text="<answer>1/2</answer>", *, weight=1.0, is_graded=True, form=0.0):
    total = weight * reward + form
    empty = Response(array("i"), array("f"), array("i"), "stop", memoryview(b""))
    rewards = {"accuracy": reward, "format": form}
    return GradedResponse(empty, text, rewards, total, "", is_graded=is_graded)


def test_advantages_of_a_logged_group_are_those_of_the_corrected_rewards():
    prompt = make_prompt("half?", "math", "1/2", {"data_source": "halves"})
    # The second is wrongly rejected, and the fourth could not be graded.
    group = Group(
        prompt,
        [],
        [
            logged(1.0, weight=2.0, form=0.5),
            logged(0.0, weight=2.0, form=0.5),
            logged(0.0, weight=2.0, form=0.5, text="<answer>3</answer>"),
            logged(0.0, is_graded=False),
        ],
    )
    group = from_record(decode(encode(to_record(0, group))), prompt)
    responses = list(logged_responses([group], "step 7", {"accuracy": 2.0, "format": 1.0}))
    assert [response.total for response in responses] == [2.5, 0.5, 0.5, None]
    assert {response.source for response in responses} == {"halves"}
    assert responses[1].load().fields["question"] == "half?"
    wrong = {responses[1].id}
    result = asyncio.run(audit_verifier(responses, reader_with(wrong), size=10))
    # Of 2.5, 0.5, 0.5 and of 2.5, 2.5, 0.5.
    before = [sqrt(2), -1 / sqrt(2), -1 / sqrt(2), 0.0]
    after = [1 / sqrt(2), 1 / sqrt(2), -sqrt(2), 0.0]
    change = sum(abs(a - b) for a, b in zip(before, after, strict=True)) / 4
    assert result.effect.mean_change.value == pytest.approx(change, rel=1e-5)
    assert result.effect.sign_changes.value == 1.0
    assert result.num_ungraded == 1
    assert [response.id for response, _ in result.concerned] == sorted(wrong)
    assert result.overall.wrongly_rejected.value == 0.5
    assert result.as_json()["concerned"][0]["response"] == "<answer>1/2</answer>"


def test_undecided_verdicts_widen_the_effect_to_both_sides():
    prompt = make_prompt("half?", "math", "1/2", {})
    groups = [Group(prompt, [], [logged(1.0), logged(0.0)]) for _ in range(4)]
    responses = list(logged_responses(groups, "step 1", {"accuracy": 1.0}))
    undecided = {responses[0].id, responses[2].id}
    result = asyncio.run(audit_verifier(responses, reader_with((), undecided), size=8))
    # Reversed, both of two groups' responses are rejected: advantages of 1 and -1 become 0.
    assert result.effect.mean_change.low == 0.0
    assert result.effect.mean_change.high >= 0.5
    signs = result.effect.sign_changes
    assert (signs.low, signs.high) == (0.0, 0.5)
    assert result.overall.wrongly_accepted.low == 0.0
    assert result.overall.wrongly_accepted.high == 0.5


def test_kinds_without_a_second_reader_are_counted_and_not_drawn():
    prompt = make_prompt("fine?", "judge", "yes", {})
    groups = [Group(prompt, [], [logged(1.0)])]
    groups += [Group(make_prompt("half?", "math", "1/2", {}), [], [logged(1.0)])]
    result = asyncio.run(
        audit_verifier(list(logged_responses(groups, "step 1", {"accuracy": 1.0})), reader_with(()))
    )
    assert result.without_reader == {"judge": 1}
    assert result.num_responses == 1 and len(result.judged) == 1 and result.effect is None


class Pool:
    """Returns grades of a program's tests in turn."""

    def __init__(self, *rewards):
        self.rewards = list(rewards)

    async def grade(self, kind, response, truth, **fields):
        reward = self.rewards.pop(0)
        return SimpleNamespace(
            reward=reward or 0.0, is_graded=reward is not None, reason="test 2", verdict=""
        )


@pytest.mark.parametrize(
    ("rewards", "outcome", "left"),
    [
        ((1.0, 1.0, 1.0), "confirmed", 0),
        ((0.0, 0.5, 0.0), "wrong", 0),
        ((1.0, 0.0, 1.0), "undecided", 1),
        ((0.0, 1.0, 1.0), "undecided", 1),
        ((None, 1.0, 1.0), "undecided", 2),
    ],
)
def test_programs_whose_verdict_changes_are_flaky(rewards, outcome, left):
    pool = Pool(*rewards)
    content = AnswerContent("```python\nprint(1)\n```", {}, {})
    response = AuditedResponse("1", "-", "code", None, 1.0, 1.0, lambda: content)
    finding = asyncio.run(PooledSecondReader(pool, {}).read(response))
    assert finding.outcome == outcome
    assert len(pool.rewards) == left
    assert finding.reason.startswith("flaky") == (outcome == "undecided" and rewards[0] is not None)


@pytest.mark.parametrize(
    ("verdict", "outcome", "without"),
    [
        ("right,wrong", "undecided", "wrong"),
        ("right,right", "confirmed", "confirmed"),
        ("right,unsure", "confirmed", "undecided"),
    ],
)
def test_verdicts_of_math_verify_are_not_confirmed_by_math_verify(verdict, outcome, without):
    asked = []

    class Reader:
        async def grade(self, *_, **fields):
            asked.append(fields)
            return Grade(0.0, "", verdict=verdict)

    content = AnswerContent("<answer>1</answer>", "2", {})
    response = AuditedResponse("1", "-", "math", None, 1.0, 1.0, lambda: content)
    for options, expected in (({}, outcome), ({"without_math_verify": True}, without)):
        second_reader = PooledSecondReader(Reader(), {}, **options)
        assert asyncio.run(second_reader.read(response)).outcome == expected
    assert [fields.get("without_math_verify", False) for fields in asked] == [False, True]
