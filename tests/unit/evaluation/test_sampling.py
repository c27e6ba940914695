"""The loop of `eval` and `sample`: what a failure leaves in the log, and how the log is read."""

import asyncio
from dataclasses import replace

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.data.prompt import make_prompt
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.sampling import MAX_UNGRADED, ResponseSampler, sample_seed


class EvaluatedModel:
    """Responds `limit` times, then fails; keeps the seeds."""

    concurrency = 2
    identity: dict = {}

    def __init__(self, limit=1_000):
        self.limit, self.seeds = limit, []

    async def start(self):
        assert not self.seeds

    async def close(self):
        assert self.seeds

    async def respond(self, question, seed, before=()):
        if len(self.seeds) == self.limit:
            raise RuntimeError("the engine died")
        self.seeds.append(seed)
        return TextResponse(f"about {question}", 3)


class Grader:
    """Takes a while for each response; fails on all of them if it is broken."""

    def __init__(self, is_broken=False):
        self.is_broken = is_broken

    async def grade(self, prompt, response):
        await asyncio.sleep(0.05)
        if self.is_broken:
            return replace(response, reason="cannot be graded: no sandbox", is_ungraded=True)
        return replace(response, rewards={"accuracy": 1.0}, reward=1.0, reason="right")


def run_sampler(path, model, grader, num_questions=40, num_samples=2, title=""):
    prompts = [make_prompt(f"{i}?", "math", i, {}) for i in range(num_questions)]
    prompt_set = PromptSet(title, prompts, num_samples)

    async def run():
        log = ResponseLog(path, "eval" if title else "sample")
        sampler = ResponseSampler(
            model, grader, log, [prompt_set], 0, lambda *_: {}, by_prompt=not title
        )
        await sampler.run()

    asyncio.run(run())


def test_what_was_sampled_before_an_engine_failed_is_graded_and_logged(tmp_path):
    path, model = tmp_path / "samples.jsonl", EvaluatedModel(limit=5)
    with pytest.raises(RuntimeError, match="engine"):
        run_sampler(path, model, Grader())
    assert sorted(line["seed"] for line in read_lines(path)) == sorted(model.seeds)
    resumed = EvaluatedModel()
    run_sampler(path, resumed, Grader())
    assert len(resumed.seeds) == 75 and not set(resumed.seeds) & set(model.seeds)


def test_a_broken_grader_stops_sampling_and_loses_nothing(tmp_path):
    path, model = tmp_path / "samples.jsonl", EvaluatedModel()
    with refused("rewards", Cause.FAILED, "math", "no sandbox"):
        run_sampler(path, model, Grader(is_broken=True))
    lines = list(read_lines(path))
    assert MAX_UNGRADED <= len(lines) == len(model.seeds) < 80
    resumed = EvaluatedModel()
    run_sampler(path, resumed, Grader())
    assert len(resumed.seeds) == 80 - len(lines)
    last = {(line["id"], line["index"]): line for line in read_lines(path)}
    assert len(last) == 80 and all(line["reward"] == 1.0 for line in last.values())


def test_a_line_says_whether_its_grader_failed_and_an_older_one_by_its_reason():
    failed = TextResponse("13", reason="cannot be graded: no sandbox", is_ungraded=True)
    wrong = TextResponse("13", reason="cannot be graded: says the response")
    assert TextResponse.from_line(failed.to_line()) == failed
    assert TextResponse.from_line(wrong.to_line()) == wrong
    older = failed.to_line()
    del older["ungraded"]
    older["opened"] = older.pop("thought_opened")
    assert TextResponse.from_line(older) == failed


def test_order_of_samples(tmp_path):
    def order(title):
        model = EvaluatedModel()
        model.concurrency = 1
        run_sampler(tmp_path / f"{title}.jsonl", model, None, 2, 2, title)
        prompts = [make_prompt(f"{i}?", "math", i, {}) for i in range(2)]
        seeds = {
            sample_seed(0, (title, prompt.id), index): (number, index)
            for number, prompt in enumerate(prompts)
            for index in range(2)
        }
        return [seeds[seed] for seed in model.seeds]

    assert order("") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert order("bench") == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_ids_and_benchmarks_with_any_characters_are_found_again(tmp_path):
    path = tmp_path / "samples.jsonl"
    keys = [("a/b", "c"), ("a", "b/c"), ('q"uo\\te', 'x", "id": "y'), ("é\n", "数")]

    async def write():
        log = ResponseLog(path, "eval")
        for benchmark, question in keys:
            response = TextResponse(f"{benchmark} {question}").to_line()
            log.add({"benchmark": benchmark, "id": question, "digest": "d", "seed": 1, **response})
        await log.close()

    asyncio.run(write())
    log = ResponseLog(path, "eval")
    responses = [[line["response"] for line in lines] for lines in log.read(keys, 1)]
    assert responses == [[f"{benchmark} {question}"] for benchmark, question in keys]
    assert [line["id"] for line in log.read_others(set(keys[:2]), 1)] == [keys[2][1], keys[3][1]]
    assert log.count(keys, 1) == 4 and log.count(keys[:1], 1) == 1
