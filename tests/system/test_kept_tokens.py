"""The tokens that a real vLLM engine kept at each position, against transformers.

Oracle: fp32 rows of log-probabilities by transformers, cut here as top-k, top-p and min-p are
defined; the engine's log-probability is that of the softmax over what it says it kept."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from file_trainer import FilePusher
from sampled import PROMPTS, TOLERANCE, sample, sample_amid_a_push
from tiny_models import (
    DRAFTING,
    QWEN,
    logprobs_before_near_ties,
    reference_rows,
    write_drafting_model,
    write_model,
)

from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.client import GENERATE_PATH
from megatron_r1.engines.server.json_replies import parse_responses
from megatron_r1.models.sampling_mask import decode_mask

ENGINE = {"max_model_len": 256, "max_num_seqs": 64, "num_threads": 1, "return_sampling_mask": True}
TEMPERATURE = 0.8
CUTS = [{"top_p": 0.7, "top_k": 12}, {"top_k": 5}, {"min_p": 0.2, "top_k": 50}]
MIN_DISTANCE = 0.05
"""The least mean distance of log-probabilities from those over the vocabulary; 0.28 and more are
seen."""
TIE = 1e-4
"""Differences of log-probabilities below which either engine may order two tokens."""


@pytest.fixture(scope="module")
def models(tmp_path_factory, oracle):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        oracle(write_model, folder / name, QWEN, seed)
    return folder


@pytest.fixture(scope="module")
def fleet(models, loop, tmp_path_factory):
    fleet = EngineFleet(1, tmp_path_factory.mktemp("logs"), **ENGINE)
    loop(fleet.start(models / "a", policy_version=0))
    yield fleet
    loop(fleet.close())


def least_kept(row, top_p=1.0, top_k=None, min_p=0.0, rounding=0.0):
    """The lowest log-probability that a cut keeps, in the order in which vLLM cuts; with `rounding`
    of the sum of probabilities."""
    if min_p:  # vLLM's first
        row = torch.where(row >= row.max() + torch.tensor(min_p).log(), row, -torch.inf)
    ordered = row.sort(descending=True)[0][:top_k]
    p = ordered.softmax(0)
    return ordered[(p.cumsum(0) - p < top_p + rounding) & (ordered > -torch.inf)].min()


def check_kept(rows, response, cut, num_compared=None):
    """Of one response, or its first `num_compared` tokens, whose rows transformers computed; return
    how many tokens each kept, and the distances of the log-probabilities from those over the whole
    vocabulary."""
    counts, ids = decode_mask(response.sampling_mask, len(response.token_ids))
    distances = []
    sampled = zip(response.token_ids, counts.cumsum(), strict=True)
    for at, (token, end) in enumerate(islice(sampled, num_compared)):
        row = torch.tensor(rows[at], dtype=torch.float64)
        kept = ids[end - counts[at] : end].tolist()
        # A sum of probabilities may be top_p but for rounding.
        sure = (row > least_kept(row, **cut, rounding=-TIE) + TIE).nonzero()[:, 0].tolist()
        possible = (row > least_kept(row, **cut, rounding=TIE) - TIE).nonzero()[:, 0].tolist()
        assert {*sure} <= {*kept} <= {*possible}, (at, cut, kept)
        logprob = (row[token] - row[kept].logsumexp(0)).item()
        assert response.logprobs[at] == pytest.approx(logprob, abs=TOLERANCE), (at, cut)
        distances.append(response.logprobs[at] - row[token].item())
    return counts, distances


def check_distances(distances):
    """Over the whole vocabulary each would be another policy's, by the probability of what was
    kept."""
    assert min(distances) > -TOLERANCE and sum(distances) > MIN_DISTANCE * len(distances)


def check_groups(oracle, folder, groups, cut):
    """What comes after a near tie of experts is not compared."""
    sizes, distances = [], []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        responses = [list(response.token_ids) for response in group]
        reference = oracle(reference_rows, folder, prompt, responses, TEMPERATURE)
        before_ties = oracle(logprobs_before_near_ties, folder, prompt, responses, TEMPERATURE)
        for rows, response, compared in zip(reference, group, before_ties, strict=True):
            counts, found = check_kept(rows, response, cut, len(compared))
            sizes, distances = sizes + counts.tolist(), distances + found
    assert len(distances) > len(sizes) / 2, f"{len(distances)} of {len(sizes)} are compared"
    check_distances(distances)
    assert min(sizes) < max(sizes) or {*cut} == {"top_k"}, "every token kept as many"


@pytest.mark.more
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_kept_tokens_are_those_of_the_cut(models, oracle, loop, fleet, cut):
    asked = {"temperature": TEMPERATURE, "sampling_mask": True, **cut}
    groups = loop(sample(fleet, **asked))
    check_groups(oracle, models / "a", groups, cut)
    sizes = [len(each.token_ids) for group in groups for each in group]
    assert sizes == [24] * 12


def test_requests_without_a_cut_get_none_and_scores_stay_possible(loop, fleet):
    client = fleet.engines[0].client
    for asked in ({"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.95}):
        [response] = loop(client.generate(PROMPTS[0], n=1, max_tokens=8, **asked))
        assert response.sampling_mask == b"" and len(response.token_ids) == 8
    assert len(loop(client.compute_logprobs(PROMPTS[2], 1))) == len(PROMPTS[2]) - 1


def test_bytes_equal_vllms_json(loop, fleet):
    client, prompt = fleet.engines[0].client, PROMPTS[0]
    cut = {"temperature": 1.0, "top_p": 0.7, "top_k": 12, "seed": 5}
    sampling = {"n": 2, "max_tokens": 12, "logprobs": 0, "ignore_eos": True, "detokenize": False}
    call = {"token_ids": prompt, "sampling_params": sampling | cut}
    as_json = loop(client.request("POST", GENERATE_PATH, call))
    expected = parse_responses(as_json, len(prompt), None, client.vocab_size, has_mask=True)
    found = loop(client.generate(prompt, n=2, max_tokens=12, sampling_mask=True, **cut))
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        assert replace(one, logprobs=other.logprobs, engine="") == other and one.sampling_mask


@pytest.mark.more
def test_a_response_that_a_push_interrupts_has_the_sets_of_both_policies(
    models, oracle, loop, fleet
):
    pusher = FilePusher(QWEN, fleet)
    cut = {"top_p": 0.7, "top_k": 12}
    asked = {"temperature": TEMPERATURE, "sampling_mask": True, **cut}
    groups, made_by = loop(
        sample_amid_a_push(fleet, lambda name: pusher.push(models / name), "a", "b", **asked)
    )
    assert len(made_by) == 2
    for prompt, group in zip(PROMPTS, groups, strict=True):
        responses = [list(response.token_ids) for response in group]
        tables = {
            version: oracle(reference_rows, models / name, prompt, responses, TEMPERATURE)
            for version, name in made_by.items()
        }
        for number, response in enumerate(group):
            versions = enumerate(response.policy_versions)
            _, distances = check_kept([tables[v][number][at] for at, v in versions], response, cut)
            check_distances(distances)


@pytest.mark.more
def test_accepted_drafts_have_the_sets_of_the_model_itself(oracle, loop, tmp_path):
    oracle(write_drafting_model, tmp_path / "a", 0)
    drafts = {"speculative": {"method": "mtp", "num_speculative_tokens": 2}}
    fleet = EngineFleet(1, tmp_path, **ENGINE, **drafts)
    loop(fleet.start(tmp_path / "a", policy_version=0))
    try:
        assert DRAFTING["vocab_size"] > 8
        for cut in ({"top_p": 0.7, "top_k": 8}, {"top_k": 4}):
            asked = {"temperature": TEMPERATURE, "sampling_mask": True, **cut}
            check_groups(oracle, tmp_path / "a", loop(sample(fleet, **asked)), cut)
    finally:
        loop(fleet.close())
