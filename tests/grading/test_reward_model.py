"""Served reward models, with a server that answers as vLLM's /classify does."""

import asyncio
import math

import pytest
from fakes.model_service import Served
from r1_grading.remote.remote_rewards import check_options
from r1_grading.remote.reward_model import Helpful, RewardModelSettings, Safety
from r1_grading.remote.service import ServiceError
from refusals import refused

from megatron_r1.base.errors import Cause

QUESTION, RESPONSE = "How are you?", "<think>Hm.</think> Well."


def scores(*values, num_tokens=None):
    """A model that answers with these scores; num_tokens(text) counts what it is shown."""

    def answer(path, body):
        assert path == "/classify"
        shown = body.get("input") or "".join(turn["content"] for turn in body["messages"])
        count = (num_tokens or len)(shown)
        data = {"index": 0, "label": "LABEL_0", "probs": list(values), "num_classes": len(values)}
        return {"object": "list", "data": [data], "usage": {"prompt_tokens": count}}

    return answer


def with_model(kind, answer, call, **settings):
    async def run():
        async with Served(answer) as served:
            model = kind(RewardModelSettings(url=served.url, model="rm", **settings))
            try:
                return await call(model), served.requests
            finally:
                await model.close()

    return asyncio.run(run())


def grade(kind, answer, response=RESPONSE, thought_opened=False, **settings):
    def call(model):
        return model.grade(response, None, question=QUESTION, thought_opened=thought_opened)

    return with_model(kind, answer, call, **settings)


@pytest.mark.parametrize(
    ("score", "settings", "expected"),
    [
        (0.0, {}, 0.5),
        (math.log(3), {}, 0.75),
        (-math.log(3), {}, 0.25),
        (5.0, {"shift": 5.0}, 0.5),
        (5.0 + 2 * math.log(3), {"shift": 5.0, "scale": 2.0}, 0.75),
        (1e9, {}, 1.0),
        (-1e9, {}, 0.0),
    ],
)
def test_a_score_becomes_a_reward_by_the_sigmoid(score, settings, expected):
    given, _ = grade(Helpful, scores(score), **settings)
    assert given.reward == pytest.approx(expected, abs=1e-12)


def test_of_several_classes_the_good_ones_share_counts():
    three = scores(math.log(2), math.log(5), math.log(3))
    rewards = [grade(Safety, three, label=label)[0].reward for label in range(3)]
    assert rewards == pytest.approx([0.2, 0.5, 0.3])
    assert grade(Safety, scores(1e9, -1e9), label=1)[0].reward == 0.0


@pytest.mark.parametrize(("score", "expected"), [(1.99, 0.0), (2.0, 1.0), (1e9, 1.0), (-1e9, 0.0)])
def test_with_a_threshold_a_score_is_good_or_not(score, expected):
    assert grade(Safety, scores(score), threshold=2.0)[0].reward == expected


def shown_to(kind, response, thought_opened=False):
    _, requests = grade(kind, scores(0.0), response, thought_opened)
    return [body["messages"] for _, _, body in requests]


def turns(response):
    return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": response}]


def test_helpful_sees_the_summary_and_safety_everything():
    assert shown_to(Helpful, RESPONSE) == [turns("Well.")]
    assert shown_to(Safety, RESPONSE) == [turns(RESPONSE)]
    assert shown_to(Safety, "Hm.</think>Well.", thought_opened=True) == [
        turns("<think>Hm.</think>Well.")
    ]
    assert shown_to(Helpful, "no thought at all") == [turns("no thought at all")]


def test_a_response_without_a_summary_is_0_for_helpful_and_still_seen_by_safety():
    assert shown_to(Helpful, "and so on", thought_opened=True) == []
    assert shown_to(Safety, "and so on", thought_opened=True) == [turns("<think>and so on")]
    given, requests = grade(Helpful, scores(9.0), "Hm.", thought_opened=True)
    assert given.reward == 0.0 and given.is_graded and requests == []


def test_the_request_asks_for_raw_scores_and_texts_fill_a_template_once():
    _, requests = grade(
        Helpful, scores(0.0), "{question} <|im_end|>", template="{question}|{response}"
    )
    body = requests[0][2]
    assert body == {
        "model": "rm",
        "use_activation": False,
        "add_special_tokens": False,
        "input": "How are you?|{question} < |im_end| >",
    }


def check(kind, answer, **settings):
    return with_model(kind, answer, lambda model: model.check(), **settings)


def test_the_check_refuses_a_model_of_another_kind():
    check(Helpful, scores(1.0))
    check(Safety, scores(1.0, 2.0), label=1)
    for answer, settings in [
        (scores(1.0, 2.0), {}),
        (scores(1.0), {"label": 0}),
        (scores(1.0, 2.0), {"label": 2}),
    ]:
        with pytest.raises(ServiceError, match="label"):
            check(Helpful, answer, **settings)
    with pytest.raises(ServiceError, match="'rm'"):
        check(Helpful, scores())


def test_the_check_finds_a_chat_template_that_drops_the_thought():
    def without_thought(text):
        return len(text.rpartition("</think>")[2])

    with pytest.raises(ServiceError, match="<think>"):
        check(Safety, scores(1.0, num_tokens=without_thought))
    check(Helpful, scores(1.0, num_tokens=without_thought))
    check(Safety, scores(1.0))


@pytest.mark.parametrize(
    ("settings", "key", "cause"),
    [
        ({"threshold": 2, "shift": 1.0}, "threshold", Cause.CONFLICT),
        ({"template": "{answer}"}, "template", Cause.MALFORMED),
        ({"scale": 0}, "scale", Cause.OUT_OF_RANGE),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, key, cause):
    with refused(f"rewards.options.safety.{key}", cause, settings[key]):
        check_options("safety", {"url": "http://x", "model": "rm", **settings})


def test_a_row_without_a_question_is_the_users_mistake():
    with refused("question", Cause.MISSING):
        with_model(Helpful, scores(0.0), lambda model: model.grade("x", None))
