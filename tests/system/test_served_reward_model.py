"""A real vLLM server of a reward model against transformers: raw scores, chat template, limits."""

import asyncio
import concurrent.futures
import math
import multiprocessing
from pathlib import Path

import pytest
from pooling_server import pooling_server
from r1_grading import RewardPool
from r1_grading.rewards import UNGRADED
from reward_model_data import write_reward_model

pytestmark = pytest.mark.more
QUESTION = "How are you?"
RESPONSES = ["<think>Hm.</think> Well.", "<think>Hm!</think> Who asks?", "no thought"]


def reference_scores(folder, responses):
    """The raw scores by transformers, fp32, of what the chat template makes of each response."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for response in responses:
        text = f"[user] {QUESTION}\n[assistant] {response}\n"
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            found.append(model(tokens).logits.item())
    return found


@pytest.fixture(scope="module")
def oracle():
    """Runs a function in a process of its own, without transformers in this."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def model(tmp_path_factory, oracle) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    oracle(write_reward_model, folder)
    return folder


@pytest.fixture(scope="module")
def url(model):
    with pooling_server(model) as address:
        yield address


def grade(url, kind, responses, **settings):
    async def run():
        async with RewardPool(1) as pool:
            row = {"question": QUESTION, "url": url, "model": "rm", **settings}
            jobs = [pool.grade(kind, response, None, **row) for response in responses]
            return await asyncio.gather(*jobs)

    return asyncio.run(run())


def sigmoid(score, shift=0.0, scale=1.0):
    return 1 / (1 + math.exp(-(score - shift) / scale))


def test_rewards_are_the_sigmoid_of_transformers_scores(url, model, oracle):
    whole = oracle(reference_scores, model, RESPONSES)
    summaries = oracle(reference_scores, model, ["Well.", "Who asks?", "no thought"])
    assert len({round(score, 2) for score in whole + summaries}) == 5
    # fp32 on both sides, sums in another order.
    for kind, expected in [("safety", whole), ("helpful", summaries)]:
        rewards = [given.reward for given in grade(url, kind, RESPONSES)]
        assert rewards == pytest.approx([sigmoid(score) for score in expected], abs=1e-5), kind
    shifted = grade(url, "safety", RESPONSES, shift=0.2, scale=0.5)
    expected = [sigmoid(score, 0.2, 0.5) for score in whole]
    assert [given.reward for given in shifted] == pytest.approx(expected, abs=1e-5)


def test_a_template_is_sent_as_it_stands(url):
    template = "[user] {question}\n[assistant] {response}\n"
    by_server = [given.reward for given in grade(url, "safety", RESPONSES)]
    by_us = [given.reward for given in grade(url, "safety", RESPONSES, template=template)]
    assert by_us == pytest.approx(by_server, abs=1e-6)
    changed = [
        given.reward for given in grade(url, "safety", RESPONSES, template="<bos>" + template)
    ]
    assert changed != pytest.approx(by_server, abs=1e-6)


def test_a_response_longer_than_the_model_reads_costs_that_sample(url):
    fine, long = grade(url, "safety", ["<think>Hm.</think>", "word " * 300])
    assert not fine.reason.startswith(UNGRADED)
    assert long.reward == 0.0 and long.reason.startswith(f"{UNGRADED}: status 400")


def test_a_wrong_model_name_is_said(url):
    with pytest.raises(RuntimeError, match="404.*check url and model"):
        grade(url, "helpful", RESPONSES, model="another")
