"""The metrics of a held-out evaluation."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.heldout import evaluate_heldout
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout, RolloutSampling
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response


def run(correct_counts, ungraded=0):
    """Return the metrics of an evaluation with 4 responses per question. `correct_counts` has the
    number of right ones (the right answer is 1) of each question; the last `ungraded` of each could
    not be graded."""

    def group(question, num_correct):
        responses = []
        for i in range(4):
            text = f"<answer>{1 if i < num_correct else 2}</answer>"
            rewards = {"accuracy": float(i < num_correct), "format": 0.25}
            response = Response([5] * (i + 1), [0.0] * (i + 1), [0] * (i + 1), "stop")
            lost = () if i < 4 - ungraded else ("accuracy",)
            graded = GradedResponse(
                response, text, rewards, rewards["accuracy"], "compared", lost, not lost
            )
            responses.append(graded)
        return Group(make_prompt(f"{question}?", "math", "1", {}), [1], responses)

    async def collect(prompts, sampling):
        return Rollout([group(q, count) for q, count in enumerate(correct_counts)], 2.0, 1.0)

    # No pool: where one number has most of the votes, nothing is compared by meaning.
    text = SimpleNamespace(opens_thought=False)
    collector = SimpleNamespace(
        collect=collect, pool=None, tokenizer=text, check_grades=lambda groups: None
    )
    metrics, groups = asyncio.run(
        evaluate_heldout(collector, [], RolloutSampling(4, 1.0, 1.0, 8), RewardsConfig())
    )
    assert len(groups) == len(correct_counts)
    return metrics


def test_estimates_have_intervals_over_questions():
    metrics = run([4, 0] * 200)
    assert metrics["eval/pass@1"] == metrics["eval/cons@4"] == 0.5
    assert (metrics["eval/format"], metrics["eval/response_length"]) == (0.25, 2.5)
    for name in ("pass@1", "cons@4"):
        low, high = metrics[f"interval/{name}/low"], metrics[f"interval/{name}/high"]
        # 1.96 · sqrt(1/4 / 400 questions); 1,600 independent answers would have half of it.
        assert 0.5 - low == pytest.approx(0.049, abs=0.004)
        assert high - 0.5 == pytest.approx(0.049, abs=0.004)


def test_ungraded_responses_count_in_no_mean():
    metrics = run([3, 1], ungraded=1)
    assert metrics["eval/pass@1"] == pytest.approx((3 / 3 + 1 / 3) / 2)
    assert metrics["eval/ungraded"] == 0.25
    assert metrics["eval/format"] == 0.25, "which was graded"
    none_left = run([0], ungraded=4)
    assert "eval/pass@1" not in none_left and none_left["eval/ungraded"] == 1.0


def test_the_majority_is_not_the_mean_and_one_question_has_no_interval():
    metrics = run([3])
    assert (metrics["eval/pass@1"], metrics["eval/cons@4"]) == (0.75, 1.0)
    assert not [key for key in metrics if key.startswith("interval/")]


def test_compared_responses_have_win_rates_beside_the_rest():
    """Four responses a question of 5 to 8 characters; the judge likes what is longer than 6."""

    def group(kind, question):
        responses = []
        for length in (5, 6, 7, 8):
            tokens = Response([5], [0.0], [0], "stop")
            preference = {5: 0.0, 6: 0.5}.get(length, 1.0)
            rewards = {"accuracy": preference if kind == "judge" else 0.0}
            text = f"<think>thought</think>{'x' * length}"
            responses.append(GradedResponse(tokens, text, rewards, 0.0, ""))
        return Group(make_prompt(f"{question}?", kind, "y" * 6, {}), [1], responses)

    async def collect(prompts, sampling):
        kinds = ["judge", "code", "judge"] * 20
        return Rollout([group(kind, i) for i, kind in enumerate(kinds)], 2.0, 1.0)

    text = SimpleNamespace(opens_thought=False)
    collector = SimpleNamespace(
        collect=collect, pool=None, tokenizer=text, check_grades=lambda groups: None
    )
    sampling = RolloutSampling(4, 1.0, 1.0, 8)
    judge = {"judge": {"mode": "compare", "part": "summary"}}
    comparing = RewardsConfig().model_copy(update={"options": judge})
    metrics, _ = asyncio.run(evaluate_heldout(collector, [], sampling, comparing))
    assert metrics["eval/win_rate"] == 2.5 / 4
    assert metrics["eval/lc_win_rate"] == pytest.approx(0.5, abs=0.02)
    assert metrics["interval/lc_win_rate/low"] <= metrics["eval/lc_win_rate"]
    plain, _ = asyncio.run(evaluate_heldout(collector, [], sampling, RewardsConfig()))
    assert "eval/win_rate" not in plain and plain["eval/pass@1"] == metrics["eval/pass@1"]
