"""Preference pairs and safety labels: which responses are compared, votes, and lengths."""

import asyncio
import itertools
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fakes.model_service import Served, judge_that
from r1_grading.remote.judge import PairVotes
from r1_grading.remote.service import Ungradable
from refusals import refused
from sample_answers import PROMPT, answer, run_decide, selection

from megatron_r1.base.errors import Cause
from megatron_r1.config.sample import PairsConfig, SampleConfig
from megatron_r1.data.prompt import make_prompt
from megatron_r1.sample.preference_pairs import (
    PreferencePairs,
    log_ratio,
    make_pairs,
    pairs_to_drop,
)
from megatron_r1.sample.response_judges import FunctionJudge, make_judge
from megatron_r1.sample.result_cache import ResultCache
from megatron_r1.sample.safety_labels import SafetyLabels
from megatron_r1.sample.user_functions import UserFunction, load_function

REFUSED = yaml.safe_load(Path(__file__).with_name("refused_judges.yaml").read_text())


def summary(index, words):
    return answer(index, None, text=f"<think>Hm {index}.</think>" + " ".join(["word"] * words))


def longer(question, first, second):
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def user_function(name, function):
    return UserFunction(name, "sample.judge", function, (name, "digest"))


def function_judge(function, folder, name="j:f", votes=4):
    return FunctionJudge(user_function(name, function), votes, ResultCache(folder / "votes.jsonl"))


def pairs_of(tmp_path, function, responses, name="j:f", prompt=PROMPT, **settings):
    """(decisions, rows, calls of the judge)"""
    calls = []

    def counted(*texts):
        calls.append(texts)
        return function(*texts)

    settings = PairsConfig(**settings)
    judge = FunctionJudge(
        user_function(name, counted), settings.votes, ResultCache(tmp_path / "votes.jsonl")
    )
    decide = PreferencePairs(selection(output="pairs"), settings, judge)
    return *run_decide(decide, responses, prompt), calls


def test_a_clear_preference_makes_a_pair_with_its_votes(tmp_path):
    short, long = summary(0, 3), summary(1, 4)
    decided, [row], calls = pairs_of(tmp_path, longer, [short, long])
    assert decided == {0: "rejected", 1: "chosen"}
    assert row == {
        "question": PROMPT.question,
        "chosen": long.text,
        "rejected": short.text,
        "votes": {"chosen": 4, "rejected": 0, "ties": 0},
        "id": PROMPT.id,
    }
    # The judge sees summaries, each of them first in two of four votes.
    texts = ("word word word", "word word word word")
    assert Counter(calls) == {(PROMPT.question, *texts): 2, (PROMPT.question, *texts[::-1]): 2}


@pytest.mark.parametrize("votes", [2, 4, 10])
@pytest.mark.parametrize(
    "function", [lambda q, a, b: 1.0, lambda q, a, b: 0.0, lambda q, a, b: 0.8]
)
def test_a_judge_with_an_eye_for_order_alone_makes_no_pairs(tmp_path, function, votes):
    responses = [summary(i, i + 1) for i in range(6)]
    decided, rows, _ = pairs_of(tmp_path, function, responses, per_prompt=3, votes=votes)
    assert set(decided.values()) == {"tie"} and rows == []


@pytest.mark.parametrize(
    ("in_favour", "margin", "code"),
    [(4, 1.0, "chosen"), (3, 0.5, "chosen"), (3, 0.51, "near_tie"), (2, 0.0, "tie")]
    + [(1, 0.5, "rejected"), (1, 0.6, "near_tie"), (0, 1.0, "rejected")],
)
def test_near_ties_are_dropped(tmp_path, in_favour, margin, code):
    # 4 votes for a clear winner, of which some are for the second in fact: 3 : 1 leads by a half.
    votes = iter([1.0] * in_favour + [0.0] * (4 - in_favour))

    def for_the_long_one(question, first, second):
        vote = next(votes)
        return vote if len(first) > len(second) else 1 - vote

    decided, rows, _ = pairs_of(
        tmp_path, for_the_long_one, [summary(0, 9), summary(1, 8)], margin=margin
    )
    assert decided[0] == code
    assert len(rows) == (code in ("chosen", "rejected"))


def test_no_vote_is_cast_twice(tmp_path):
    responses = [summary(i, 2 * i + 1) for i in range(4)]
    first = pairs_of(tmp_path, longer, responses, per_prompt=2)
    again = pairs_of(tmp_path, longer, responses, per_prompt=2)
    assert len(first[2]) == 8 and again == (*first[:2], [])
    # Another judge's votes are its own.
    assert len(pairs_of(tmp_path, longer, responses, "j:g", per_prompt=2)[2]) == 8


def test_answers_without_a_summary_are_not_compared(tmp_path):
    open_thought = answer(0, None, text="<think>and so on")
    bare = answer(1, None, text="<think>x</think> ")
    cut = answer(2, None, text="<think>x</think> 4", is_truncated=True)
    decided, rows, calls = pairs_of(tmp_path, longer, [open_thought, bare, cut, summary(3, 1)])
    assert decided == {0: "no_summary", 1: "no_summary", 2: "truncated", 3: "unpaired"}
    assert rows == calls == []
    decided, rows, calls = pairs_of(
        tmp_path, longer, [open_thought, summary(3, 1)], part="response"
    )
    assert len(rows) == 1 and calls[0][1] == "<think>and so on"


def test_pairs_are_of_the_nearest_lengths():
    draw = random.Random(0)
    for _ in range(200):
        lengths = {i: draw.randrange(1, 60) for i in range(draw.randrange(0, 7))}
        wanted = draw.randrange(1, 4)
        pairs = make_pairs(lengths, wanted)
        left = dict(lengths)
        for pair in pairs:  # each is the best of what was left
            ratios = {
                p: abs(math.log(left[p[0]] / left[p[1]]))
                for p in itertools.combinations(sorted(left), 2)
            }
            assert pair == min(ratios, key=lambda p: (ratios[p], p))
            del left[pair[0]], left[pair[1]]
        assert len(pairs) == min(wanted, len(lengths) // 2)


def length_weight(ratios):
    """The weight that a Bradley-Terry model on the log of the length alone would learn, found by
    bisection of its loss's slope: Σ d sigmoid(-w d) falls in w."""
    low, high = -50.0, 50.0
    for _ in range(200):
        w = (low + high) / 2
        slope = math.fsum(d / (1 + math.exp(min(700, w * d))) for d in ratios)
        low, high = (w, high) if slope > 0 else (low, w)
    return low


def test_after_balancing_length_tells_nothing():
    draw = random.Random(1)
    # A judge that likes length: log ratios around 0.3.
    ratios = {i: draw.gauss(0.3, 0.6) for i in range(400)}
    dropped = pairs_to_drop(ratios, max_bias=0.01)
    left = [d for i, d in ratios.items() if i not in dropped]
    assert abs(math.fsum(left) / len(left)) <= 0.01
    assert length_weight(ratios.values()) > 1.0
    assert abs(length_weight(left)) < 0.15
    # One pair less would not have been enough, and only heavy ones went.
    assert min(ratios[i] for i in dropped) >= max(left)
    kept_one_more = [*left, min(ratios[i] for i in dropped)]
    assert abs(math.fsum(kept_one_more) / len(kept_one_more)) > 0.01


@pytest.mark.parametrize("bias", [0.0, 0.05, 0.3])
def test_every_pair_that_goes_is_the_one_that_helps_most(bias):
    draw = random.Random(str(bias))
    for _ in range(100):
        ratios = {i: draw.uniform(-1, 1.5) for i in range(draw.randrange(1, 12))}
        left = dict(ratios)
        while abs(math.fsum(left.values())) > bias * len(left):  # by brute force
            total = math.fsum(left.values())
            del left[min(left, key=lambda i: abs(total - left[i]))]
        assert pairs_to_drop(ratios, bias) == ratios.keys() - left.keys()


def test_balancing_drops_few():
    draw = random.Random(2)
    ratios = {i: draw.gauss(-0.2, 0.5) for i in range(500)}
    dropped = pairs_to_drop(ratios, 0.02)
    # No smaller set can do it: not even the most one-sided ones.
    ordered = sorted(ratios.values())
    bound = next(n for n in range(500) if -math.fsum(ordered[n:]) <= 0.02 * (500 - n))
    assert bound <= len(dropped) <= bound + 1


def test_lengths_are_those_of_what_is_compared(tmp_path):
    # The shorter summary has by far the longer thought.
    long_thought = answer(0, None, text="<think>" + "so " * 500 + "</think>ab")
    settings = PairsConfig()
    judge = FunctionJudge(
        user_function("j:f", lambda q, a, b: float(a == "ab")),
        4,
        ResultCache(tmp_path / "v"),
    )
    decide = PreferencePairs(selection(output="pairs"), settings, judge)
    run_decide(decide, [long_thought, answer(1, None, text="<think>x</think>abcd")])
    assert list(decide.log_ratios.values()) == [pytest.approx(math.log(2 / 4))]
    assert log_ratio("", "ab") == -math.log(2)


def test_pairs_left_out_for_their_lengths_say_so(tmp_path):
    settings = PairsConfig(max_length_bias=0.1)
    judge = function_judge(longer, tmp_path)
    decide = PreferencePairs(selection(output="pairs"), settings, judge)
    prompts = [make_prompt(f"{i}?", "helpful", None, {}) for i in range(3)]
    sizes = [(1, 40), (10, 11), (30, 31)]  # words: a far longer winner, and two slightly longer
    groups = [[summary(0, a), summary(1, b)] for a, b in sizes]
    for prompt, group in zip(prompts, groups, strict=True):
        run_decide(decide, group, prompt)
    assert decide.length_bias()["length_bias_before"] > 1
    decide.balance()
    decided = [run_decide(decide, g, p) for p, g in zip(prompts, groups, strict=True)]
    assert [codes[1] for codes, _ in decided] == ["length_balance", "chosen", "chosen"]
    assert [len(rows) for _, rows in decided] == [0, 1, 1]
    bias = decide.length_bias()
    assert bias["pairs"] == 2 and 0 < bias["length_bias"] <= 0.1


def test_labels_are_of_the_whole_response(tmp_path):
    seen = []

    def is_safe(question, response):
        seen.append(response)
        return "bomb" not in response

    judge = function_judge(is_safe, tmp_path)
    harmful = answer(0, None, text="<think>A bomb is made of …</think>I cannot help.")
    opened = answer(1, None, text="Fine.</think>Hello.", thought_opened=True)
    empty = answer(2, None, text=" ")
    decide = SafetyLabels(selection(output="labels"), judge)
    decided, rows = run_decide(decide, [harmful, opened, empty])
    assert decided == {0: "unsafe", 1: "safe", 2: "empty"}
    assert [(row["label"], row["response"]) for row in rows] == [
        (0, harmful.text),
        (1, "<think>Fine.</think>Hello."),
    ]
    assert rows[0]["votes"] == {"safe": 0.0, "unsafe": 1.0}
    assert sorted(seen) == sorted(row["response"] for row in rows)


def served(output, decide, work, tmp_path, **options):
    """What `work(judge)` gives, and the requests."""

    async def run():
        async with Served(judge_that(decide)) as server:
            settings = {"url": server.url, "model": "m", **options}
            config = SampleConfig(output=output)
            judge = make_judge(config, settings, ResultCache(tmp_path / "votes.jsonl"))
            try:
                await judge.check()
                count = len(server.requests)
                result = await work(judge)
                return result, len(server.requests) - count
            finally:
                await judge.close()

    return asyncio.run(run())


def test_a_served_judge_compares_and_is_asked_once(tmp_path):
    def decide(texts):
        return "A" if "good" in texts["response A"] else "B"

    def work(judge):
        return judge.compare("Q?", "bad", "good")

    compared, num_asked = served("pairs", decide, work, tmp_path)
    assert (compared.wins, compared.losses, compared.ties, num_asked) == (0, 4, 0, 4)
    assert served("pairs", decide, work, tmp_path) == (compared, 0)


def test_a_served_judge_labels_by_its_votes(tmp_path):
    verdicts = iter(["safe", "unsafe", "unsafe"])
    seen = []

    def decide(texts):
        seen.append(texts)
        return next(verdicts)

    fraction, num_asked = served("labels", decide, lambda j: j.safety("Q?", "R."), tmp_path)
    assert fraction == pytest.approx(1 / 3) and num_asked == 3
    assert seen[0] == {"question": "Q?", "response": "R."}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: str(case["sample"]))
def test_a_judge_that_cannot_be_asked_is_named(tmp_path, monkeypatch, case):
    (tmp_path / "user_judges.py").write_text("def length(question, first, second): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config, options = SampleConfig(**case["sample"]), case.get("options", {})
    with refused(case["key"], Cause(case["cause"]), case["shows"]):
        make_judge(config, options, ResultCache(tmp_path / "v"))


@pytest.mark.parametrize("vote", ["A", None, 1.5, -0.1, float("nan")])
def test_a_judge_that_returns_no_preference_is_named(tmp_path, vote):
    with refused("sample.judge", Cause.FAILED, repr(vote)):
        pairs_of(tmp_path, lambda *texts: vote, [summary(0, 1), summary(1, 2)])


def test_what_a_function_raises_names_the_function_and_the_question(tmp_path):
    def fails(question, first, second):
        raise ConnectionError("no network")

    with pytest.raises(RuntimeError, match=r"sample\.judge: j:f .*no network.*6 x"):
        pairs_of(tmp_path, fails, [summary(0, 1), summary(1, 2)])


def test_a_pair_that_could_not_be_judged_is_not_asked_for_again():
    """It would get past the balance of lengths, which is of the first pass."""
    outcomes = [Ungradable("no verdict"), PairVotes(4, 0, 0)]

    class Judge:
        async def compare(self, *texts):
            outcome = outcomes.pop(0)
            if isinstance(outcome, Ungradable):
                raise outcome
            return outcome

    decide = PreferencePairs(selection(output="pairs"), PairsConfig(), Judge())
    for _ in range(2):
        decided, rows = run_decide(decide, [summary(0, 3), summary(1, 4)])
        assert (decided, rows) == ({0: "ungraded", 1: "ungraded"}, [])
    assert len(outcomes) == 1


def test_a_function_that_was_edited_is_another_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, identities = "def prefer(question, first, second):\n    return 1\n", []
    for text in (source, source + "# a remark\n", source.replace("1", "0")):
        (tmp_path / "edited_judge.py").write_text(text)
        judge = load_function("edited_judge:prefer", "sample.judge", "question, first, second")
        identities.append(judge.identity)
    assert identities[0] == identities[1] != identities[2]


def test_a_judge_may_be_asynchronous(tmp_path):
    async def prefer(question, first, second):
        await asyncio.sleep(0)
        return longer(question, first, second)

    judge = function_judge(prefer, tmp_path, votes=2)
    assert asyncio.run(judge.compare("Q", "a", "bb")).winner() == 1
