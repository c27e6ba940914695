"""Rewards of served models in a pool: what is tried again, what is 0, what stops a run."""

import asyncio
import json

import pytest
from aiohttp import web
from fakes.model_service import Served, by_answer, judge_that
from r1_grading import RewardPool
from r1_grading.remote import judge, service
from r1_grading.remote.remote_rewards import check_options, settings_names
from r1_grading.remote.service import ServiceError
from r1_grading.rewards import SERVED_REWARDS, resolve_reward
from r1_grading.terms import reward_arguments
from refusals import refused
from waiting import until

from megatron_r1.base.errors import Cause
from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.data.prompt import make_prompt
from megatron_r1.data.prompts import load_prompts
from megatron_r1.engines.server.responses import Response

ROW = {"question": "Name the capital of France.", "model": "m", "votes": 1}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(service, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(service, "LONGEST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(judge, "CHECK_SECONDS", 0.2)


def with_pool(answer, scenario):
    """(what scenario(pool, served) gives, the server)."""

    async def run():
        async with Served(answer) as served, RewardPool(1) as pool:
            return await scenario(pool, served), served

    return asyncio.run(run())


def grade_all(answer, responses, **settings):
    async def scenario(pool, served):
        jobs = [
            pool.grade("judge", text, "Paris", **{**ROW, "url": served.url, **settings})
            for text in responses
        ]
        return await asyncio.gather(*jobs), pool.snapshot()

    (grades, counts), served = with_pool(answer, scenario)
    return grades, counts, served


def failing(times, failure):
    """A judge whose first `times` answers about Lyon are failure()."""
    left = [times]

    def decide(texts):
        if "Lyon" in texts["response"] and left[0]:
            left[0] -= 1
            return failure()
        return by_answer(texts)

    return judge_that(decide)


def status(code, headers=None, text="no"):
    return lambda: web.Response(status=code, text=text, headers=headers)


def test_the_registry_finds_every_served_reward_and_its_settings():
    for kind in SERVED_REWARDS:
        assert resolve_reward(kind) == SERVED_REWARDS[kind]
        assert {"url", "model", "api_key_env"} <= settings_names(kind)


def test_grades_go_through_the_pool_without_a_worker():
    grades, counts, _ = grade_all(judge_that(by_answer), ["It is Paris", "Lyon"] * 20)
    assert [grade.reward for grade in grades] == [1.0, 0.0] * 20
    assert counts["remote/graded"] == 40 and counts["graded"] == 0
    assert counts["remote/ungraded"] == counts["remote/retries"] == 0


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504, 529])
def test_a_passing_failure_is_tried_again_and_changes_nothing(code):
    grades, counts, _ = grade_all(failing(2, status(code)), ["Lyon", "Paris"])
    assert [grade.reward for grade in grades] == [0.0, 1.0]
    assert grades[0].is_graded and counts["remote/retries"] == 2


@pytest.mark.parametrize("text", ["", "<html>", "{}", "[]", '{"choices": 3}'])
def test_an_answer_of_another_kind_is_a_failed_try(text):
    grades, counts, _ = grade_all(failing(2, status(200, text=text)), ["Lyon"])
    assert (grades[0].reward, grades[0].is_graded) == (0.0, True)
    assert counts["remote/retries"] == 2


def test_the_service_says_how_long_to_wait(monkeypatch):
    waited = []

    async def sleep(seconds, sleep=asyncio.sleep):
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(service.asyncio, "sleep", sleep)
    headers = iter([{"Retry-After": "7"}, {"Retry-After": "9999"}, {"Retry-After": "Mon, 1 Jan"}])
    grade_all(failing(3, lambda: status(429, next(headers))()), ["Lyon"])
    waits = [seconds for seconds in waited if seconds]
    assert waits[:2] == [7.0, 60.0] and 0 < waits[2] <= 0.04


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_the_service_refuses_costs_one_sample_and_says_so(code):
    answer = failing(10**6, status(code, text="maximum context length"))
    grades, counts, _ = grade_all(answer, ["Lyon", "Paris"])
    assert [grade.reward for grade in grades] == [0.0, 1.0]
    assert not grades[0].is_graded and str(code) in grades[0].reason
    assert "maximum context length" in grades[0].reason
    assert counts["remote/ungraded"] == 1 and counts["remote/retries"] == 0


def test_a_text_that_breaks_the_service_costs_one_sample():
    grades, counts, _ = grade_all(failing(10**6, status(500)), ["Lyon", "Paris"])
    assert [grade.reward for grade in grades] == [0.0, 1.0]
    assert not grades[0].is_graded and "500" in grades[0].reason
    assert counts["remote/ungraded"] == 1


def test_an_outage_in_the_middle_is_an_error_and_never_a_reward():
    is_down = []

    def answer(path, body):
        return web.Response(status=500) if is_down else judge_that(by_answer)(path, body)

    async def scenario(pool, served):
        row = {**ROW, "url": served.url, "retry_seconds": 0.2}
        first = await pool.grade("judge", "Paris", "Paris", **row)
        is_down.append(True)
        jobs = [pool.grade("judge", text, "Paris", **row) for text in ("Paris", "Lyon")]
        return first, await asyncio.gather(*jobs, return_exceptions=True)

    (first, after), _ = with_pool(answer, scenario)
    assert first.reward == 1.0
    assert all(isinstance(error, ServiceError) and "500" in str(error) for error in after)


@pytest.mark.parametrize("code", [429, 503, 504])
def test_a_service_that_stays_busy_is_an_error_whatever_else_works(code):
    with pytest.raises(ServiceError, match=f"{code}.*retry_seconds"):
        grade_all(failing(10**6, status(code)), ["Lyon", "Paris"], retry_seconds=0.2)


def test_a_service_that_hangs_is_an_error():
    async def hang(path, body):
        await asyncio.sleep(3600)

    with pytest.raises(ServiceError, match="0.05"):
        grade_all(hang, ["Paris"], timeout_seconds=0.05, retry_seconds=0.2)


def test_a_slow_answer_is_asked_for_again():
    slow = [3600]

    async def answer(path, body):
        if "Lyon" in json.dumps(body) and slow:
            await asyncio.sleep(slow.pop(0))
        return judge_that(by_answer)(path, body)

    grades, counts, _ = grade_all(answer, ["Lyon"], timeout_seconds=1.0)
    assert grades[0].is_graded and counts["remote/retries"] >= 1


def test_nobody_listening_is_said_at_the_start():
    async def scenario(pool, served):
        await pool.grade("judge", "", "Paris", **{**ROW, "url": "http://127.0.0.1:9"})

    with pytest.raises(ServiceError, match="127.0.0.1:9.*url"):
        with_pool(judge_that(by_answer), scenario)


@pytest.mark.parametrize(
    ("code", "remedy"), [(401, "api_key_env"), (404, "url.*model"), (307, "url"), (405, "url")]
)
def test_a_service_that_refuses_us_is_an_error_at_once(code, remedy):
    requests = []

    def answer(path, body):
        requests.append(path)
        return web.Response(status=code, headers={"Location": "http://127.0.0.1:9/elsewhere"})

    with pytest.raises(ServiceError, match=f"{code}.*{remedy}"):
        grade_all(answer, ["Paris"])
    assert len(requests) == 1


def test_the_check_is_done_once_and_by_an_empty_answer_too():
    async def scenario(pool, served):
        row = {**ROW, "url": served.url}
        empty = await asyncio.gather(*(pool.grade("judge", "", "Paris", **row) for _ in range(5)))
        return empty, len(served.requests)

    (empty, num_requests), _ = with_pool(judge_that(by_answer), scenario)
    assert [grade.reward for grade in empty] == [0.0] * 5 and num_requests == 3


def test_no_more_requests_at_once_than_allowed():
    asked = []

    async def answer(path, body):
        if "Paris" in json.dumps(body):
            asked.append(body)
            await until(lambda: len(asked) >= 3)
            await asyncio.sleep(0.02)  # in which a fourth request could come
        return judge_that(by_answer)(path, body)

    _, _, served = grade_all(answer, [f"Paris {i}" for i in range(20)], concurrency=3)
    assert served.most_open == 3


def test_closing_the_pool_ends_what_waits():
    async def hang(path, body):
        if "Lyon" in json.dumps(body):
            await asyncio.sleep(3600)
        return judge_that(by_answer)(path, body)

    async def scenario(pool, served):
        row = {**ROW, "url": served.url}
        job = asyncio.create_task(pool.grade("judge", "Lyon", "Paris", **row))
        await until(lambda: any("Lyon" in json.dumps(body) for _, _, body in served.requests))
        await pool.close()
        return await asyncio.gather(job, return_exceptions=True)

    (error,), _ = with_pool(hang, scenario)
    assert isinstance(error, ServiceError)


@pytest.mark.parametrize(
    ("options", "key", "cause"),
    [
        ({"model": None}, "model", Cause.MISSING),
        ({"model": ""}, "model", Cause.EMPTY),
        ({"url": None}, "url", Cause.MISSING),
        ({"url": "x:80"}, "url", Cause.MALFORMED),
        ({"url": "http://x:99999"}, "url", Cause.MALFORMED),
        ({"votes": 2}, "votes", Cause.CONFLICT),
        ({"votes": "many"}, "votes", Cause.MALFORMED),
        ({"votes": -1}, "votes", Cause.OUT_OF_RANGE),
    ],
)
def test_wrong_options_are_told_by_name(options, key, cause):
    options = {"url": "http://x", "model": "m", **options}
    options = {name: value for name, value in options.items() if value is not None}

    async def scenario(pool, served):
        await pool.grade("judge", "Paris", "Paris", question="?", **options)

    with refused(f"rewards.options.judge.{key}", cause, options.get(key, "")):
        check_options("judge", options)
    with refused(f"rewards.options.judge.{key}", cause):
        with_pool(judge_that(by_answer), scenario)


def test_an_unknown_option_is_one_in_a_recipe_and_may_be_a_field_of_a_prompt():
    options = {"url": "http://x", "model": "m", "vote": 3}
    with refused("rewards.options.judge.vote", Cause.UNKNOWN, "votes"):
        check_options("judge", options)


def test_only_the_controller_s_machine_needs_the_key():
    check_options("judge", {"url": "http://x", "model": "m", "api_key_env": "NO_SUCH_KEY"})
    with refused("api_key_env", Cause.NOT_FOUND, "NO_SUCH_KEY"):
        grade_all(judge_that(by_answer), ["Paris"], api_key_env="NO_SUCH_KEY")


def test_data_cannot_say_which_service_is_asked_with_whose_key():
    options = {"url": "http://ours", "model": "m", "api_key_env": "OURS"}
    theirs = {"url": "http://evil", "model": "gpt", "api_key_env": "THEIRS", "votes": 9, "k": 1}
    assert reward_arguments("judge", {"judge": options}, theirs, {}) == {**options, "k": 1}
    assert "api_key_env" not in reward_arguments("judge", {}, theirs, {})
    assert reward_arguments("judge", {}, theirs, {})["url"] == "http://evil"
    math = {"math": {"exact": True, "a": 1}}
    assert reward_arguments("math", math, {"a": 2}, {}) == {"exact": True, "a": 2}


def test_a_key_is_in_no_message(monkeypatch):
    monkeypatch.setenv("A_KEY", "sesame")
    with pytest.raises(ServiceError) as caught:
        grade_all(lambda path, body: web.Response(status=401), ["?"], api_key_env="A_KEY")
    assert "sesame" not in str(caught.value)


def test_the_url_may_have_the_apis_path_already():
    def answer(path, body):
        assert path == "/openai/v2/chat/completions"
        return judge_that(by_answer)("/v1/chat/completions", body)

    async def scenario(pool, served):
        row = {**ROW, "url": served.url + "/openai/v2/"}
        return await pool.grade("judge", "Paris", "Paris", **row)

    assert with_pool(answer, scenario)[0].reward == 1.0


def test_one_votes_verdict_cannot_serve_another():
    replies = []

    def answer(path, body):
        if "Lyon" not in json.dumps(body):
            return judge_that(by_answer)(path, body)
        replies.append(judge_that(by_answer)(path, body))
        return replies[0]

    grades, counts, _ = grade_all(answer, ["Lyon"], votes=3)
    assert not grades[0].is_graded and counts["remote/no_verdict"] == 3


class Answers:
    """Stands in for engines and tokenizer: every group is one right and one wrong answer."""

    opens_thought, closed_thought, stop_token_ids = False, "", [0]

    def encode(self, question, before=()):
        return [1]

    def decode(self, token_ids):
        return ["Lyon", "Paris"][token_ids[0]]

    async def generate(self, prompt_ids, **sampling):
        return [Response([i], [0.0], [0], "stop") for i in range(sampling["n"])]


def test_a_rollout_is_graded_by_the_recipes_judge_and_stops_when_it_is_down():
    is_down = []

    def answer(path, body):
        return web.Response(status=503) if is_down else judge_that(by_answer)(path, body)

    async def scenario(pool, served):
        options = {"url": served.url, "model": "m", "retry_seconds": 0.1}
        rewards = RewardsConfig(weights={"accuracy": 1.0}, options={"judge": options})
        collector = RolloutCollector(Answers(), pool, Answers(), rewards)
        # A column that happens to be called "model" is not the judge's.
        prompts = [make_prompt(ROW["question"], "judge", "Paris", {"model": "gpt", "votes": 4})]
        await collector.grader.check_rewards(rewards.weights, prompts)
        rollout = await collector.collect(prompts, RolloutSampling(2, 1.0, 1.0, 8))
        is_down.append(True)
        with pytest.raises(ServiceError, match="503"):
            await collector.collect(prompts, RolloutSampling(2, 1.0, 1.0, 8))
        return [graded.reward for graded in rollout.groups[0].responses]

    rewards, served = with_pool(answer, scenario)
    assert rewards == [0.0, 1.0]
    assert {body["model"] for _, _, body in served.requests} == {"m"}


def test_prompts_for_reward_models_need_no_truth(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{i}?", "kind": kind} for i, kind in enumerate(("helpful", "safety"))]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(load_prompts(path=path, heldout_fraction=0.0).train) == 2
    path.write_text(json.dumps({"question": "?", "kind": "judge"}))
    with refused("truth", Cause.MISSING):
        load_prompts(path=path)
