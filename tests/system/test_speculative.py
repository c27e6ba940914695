"""A real vLLM engine that drafts with an MTP layer: what it samples, and pushes to its drafter.

Oracles: transformers in fp32, for every log-probability and, exactly, for the distribution of the
first tokens; an engine that was started on the pushed weights, by vLLM's own checksums.
"""

import asyncio

import pytest
import torch
from draft_sampler import nucleus, probability
from engine_checksums import checksums
from file_trainer import FilePusher
from safetensors.torch import load_file, save_file
from sampled import PROMPTS, TOLERANCE, largest_difference, sample
from tiny_models import (
    DRAFTING,
    greedy_tokens,
    next_token_logprobs,
    reference_routing,
    write_drafting_model,
)

from megatron_r1.engines.fleet.draft_acceptance import AcceptanceMeter
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.models.routing_shape import routing_shape

pytestmark = pytest.mark.more


# Two drafts a pass by one MTP layer: a pass accepts none, one or both.
ENGINE = {"max_model_len": 256, "max_num_seqs": 64, "num_threads": 1}
ROUTING = routing_shape(DRAFTING)
SPECULATIVE = {"speculative": {"method": "mtp", "num_speculative_tokens": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory, oracle):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        oracle(write_drafting_model, folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def fleet(models, loop, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    fleet = EngineFleet(1, logs, return_routing=True, **ENGINE, **SPECULATIVE)
    loop(fleet.start(models / "a", policy_version=0))
    yield fleet
    loop(fleet.close())


@pytest.fixture(scope="module")
def pusher(fleet):
    return FilePusher(DRAFTING, fleet, drafts=True)


def test_log_probabilities_are_the_model_s(models, oracle, loop, fleet):
    meter = AcceptanceMeter()
    loop(meter.read(fleet.engines))
    for temperature in (1.0, 0.7):
        groups = loop(sample(fleet, temperature=temperature))
        gap = largest_difference(oracle, models / "a", groups, temperature)
        # The logits' difference is divided by the temperature: 4e-6 to 7e-6 are seen of logits.
        assert gap <= 3e-5 / temperature, f"{gap} at temperature {temperature}"
    found = loop(meter.read(fleet.engines))
    # Otherwise every token came from the same of the two paths.
    assert 0 < found["speculative/acceptance"] < 0.9, found
    # Two drafts a pass, but for the last token of a response.
    drafts = found["speculative/length"] - 1
    assert drafts == pytest.approx(2 * found["speculative/acceptance"], rel=0.1)


@pytest.mark.slow
def test_greedy_tokens_are_those_without_drafts(models, oracle, loop, fleet):
    for prompt, group in zip(PROMPTS, loop(sample(fleet, n=1, temperature=0.0)), strict=True):
        responses = [list(response.token_ids) for response in group]
        assert responses == oracle(greedy_tokens, models / "a", prompt, responses)


def test_routed_experts_are_those_of_accepted_tokens(models, oracle, loop, fleet):
    same_rows = []
    for prompt, group in zip(PROMPTS, loop(sample(fleet, routing=ROUTING)), strict=True):
        responses = [list(response.token_ids) for response in group]
        expected = oracle(reference_routing, models / "a", prompt, responses)
        for response, experts in zip(group, expected, strict=True):
            rows = torch.frombuffer(bytearray(response.routing), dtype=torch.uint8)
            rows = rows.view(-1, len(ROUTING.moe_layers), ROUTING.topk).sort(-1).values
            same_rows.append((rows == torch.tensor(experts)).all(-1).all(-1))
    # A near tie may fall either way.
    assert torch.cat(same_rows).float().mean() > 0.98


PROMPT = [5, 9, 33, 12]
SAMPLES = 4000
# Four statistics a case, each below this once in 100,000 runs of a right engine.
LEAST_PROBABILITY = 1e-5


@pytest.fixture(scope="module")
def conditionals(models, oracle):
    """log p(next) after PROMPT, PROMPT + [t1] and PROMPT + [t1, t2], by transformers."""
    tokens = range(DRAFTING["vocab_size"])
    contexts = [
        [PROMPT],
        [[*PROMPT, a] for a in tokens],
        [[*PROMPT, a, b] for a in tokens for b in tokens],
    ]
    return [
        torch.tensor(oracle(next_token_logprobs, models / "a", each), dtype=torch.float64)
        for each in contexts
    ]


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), pytest.param(0.8, 0.9, marks=pytest.mark.slow)]
)
def test_sampling_is_lossless(conditionals, loop, fleet, temperature, top_p):
    """The first token comes without a draft, the second and third are drafted ones that were
    accepted, or replacements of rejected ones: their joint distributions are the model's."""
    vocabulary = DRAFTING["vocab_size"]
    first, second, third = (nucleus(table / temperature, top_p) for table in conditionals)
    second, third = second.view(vocabulary, -1), third.view(vocabulary, vocabulary, -1)
    expected_12 = first[0][:, None] * second
    expected_23 = (expected_12[:, :, None] * third).sum(0)

    async def draw():
        settings = {"max_tokens": 4, "temperature": temperature, "top_p": top_p}
        groups = (fleet.generate(PROMPT, n=50, **settings) for _ in range(SAMPLES // 50))
        return [response for group in await asyncio.gather(*groups) for response in group]

    sampled = torch.tensor([list(response.token_ids) for response in loop(draw())])
    for begin, expected in ((0, expected_12), (1, expected_23)):
        pairs = sampled[:, begin : begin + 2]
        found = torch.bincount(pairs @ torch.tensor([vocabulary, 1]), minlength=vocabulary**2)
        assert probability(found, expected) > LEAST_PROBABILITY, f"tokens {begin + 1} and next"
        # How often the next token is the likeliest: this notices one draft in 5 that is accepted
        # without being tested.
        likeliest, often = expected.argmax(1), expected.max(1).values.sum()
        shares = torch.stack([1 - often, often])
        is_likeliest = pairs[:, 1] == likeliest[pairs[:, 0]]
        untested = torch.arange(SAMPLES) % 5 == 0
        assert probability(is_likeliest.long().bincount(), shares) > LEAST_PROBABILITY
        biased = is_likeliest | untested
        assert probability(biased.long().bincount(), shares) < LEAST_PROBABILITY


@pytest.mark.more  # starts another engine
def test_a_push_brings_the_drafter_its_weights(models, oracle, loop, fleet, pusher, tmp_path):
    """After it the engine equals, tensor for tensor, one that was started on the same weights."""

    async def started():
        async with EngineFleet(1, tmp_path, **ENGINE, **SPECULATIVE) as other:
            await other.start(models / "b")
            return await checksums(other)

    async def pushed(name):
        await pusher.push(models / name)
        return await checksums(fleet)

    expected = loop(started())
    before = loop(pushed("a"))
    drafter = {name for name in expected if "drafter.model.layers.3." in name}
    assert len(drafter) > 10
    changed = " ".join(name for name in drafter if before[name] != expected[name])
    # Not in it: eh_proj, the same in both models, and what oneDNN keeps in a form of its own.
    assert all(part in changed for part in ("enorm", "shared_head.norm", "experts", "gate"))
    for _ in range(2):  # into both buffers of the receive buffer
        assert loop(pushed("b")) == expected
    groups = loop(sample(fleet))
    assert largest_difference(oracle, models / "b", groups) <= TOLERANCE


def test_a_damaged_tensor_of_the_drafter_is_refused_by_name(models, loop, pusher):
    loop(pusher.push(models / "a"))
    loop(pusher.check_damage("model.layers.3.mlp.experts.5.up_proj.weight"))


@pytest.mark.slow  # tests/replays/test_stale_drafter.py
def test_a_stale_drafter_shows_in_the_acceptance_rate_only(models, oracle, loop, fleet, pusher):
    """Here the trainer sends the model's new weights with the MTP layer's old ones."""
    meter = AcceptanceMeter()

    async def acceptance():
        await meter.read(fleet.engines)
        groups = await sample(fleet, n=16)
        return (await meter.read(fleet.engines))["speculative/acceptance"], groups

    own = load_file(models / "a" / "model.safetensors")
    stale = models / "stale"
    stale.mkdir()
    mtp = {name: own[name] for name in own if name.startswith("model.layers.3.")}
    save_file(load_file(models / "b" / "model.safetensors") | mtp, stale / "model.safetensors")
    loop(pusher.push(stale))
    old, groups = loop(acceptance())
    assert largest_difference(oracle, models / "b", groups) <= TOLERANCE, "still lossless"
    loop(pusher.push(models / "b"))
    renewed, _ = loop(acceptance())
    assert old < 0.5 * renewed
