"""Tokens and responses about which engine and trainer disagree, and the loss without their policy
gradient, against loops in fp64."""

import asyncio
import math
from types import SimpleNamespace
from unittest.mock import AsyncMock

import algorithm_formulae as formulae
import msgspec
import pytest
import torch
from algorithm_problem import (
    HIDDEN,
    LIMIT,
    VOCABULARY,
    Problem,
    check,
    ours,
    plain,
    weighted_by_the_ratio,
    with_kl,
)
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.user_code import find_function
from megatron_r1.config import Config, parse_recipe
from megatron_r1.config.algorithms import ALGORITHM_NAMES
from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections import MASK_FUNCTIONS, wrap_loss
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.controller.run_recorder import RunState
from megatron_r1.trainer.loss_head import LossHead
from megatron_r1.trainer.operations import ModelOperations
from megatron_r1.trainer.rollout_batches import RolloutBatches
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit


class Mismatched(Problem):
    """As `Problem`, with an engine whose log-probabilities are not the trainer's."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(8)
        for i, o in enumerate(self.responses):
            noise = torch.randn(len(o), generator=g, dtype=torch.float64)
            # Of every third response hardly any.
            o.engine = (o.old + (0.001 if i % 3 == 0 else 0.4) * noise).clamp(max=-1e-3)

    def batch(self, members, numbers, first_old):
        batch, hidden = super().batch(members, numbers, first_old)
        engine = torch.zeros(batch.input_ids.shape[1], dtype=torch.float64)
        trained = [i for i in members if not math.isnan(numbers[i])]
        engine[batch.is_response] = torch.cat([self.responses[i].engine for i in trained])
        batch.rollout_logprobs = engine
        return batch, hidden


def tokens_kept(o, low, high):
    kept = []
    for t in range(len(o)):
        ratio = math.exp(o.old[t]) / math.exp(o.engine[t])
        kept.append(low <= ratio <= high)
    return kept


def responses_kept(o, low, high):
    product = 1.0
    for t in range(len(o)):
        product *= math.exp(o.old[t]) / math.exp(o.engine[t])
    return [low <= product ** (1 / len(o)) <= high] * len(o)


def without(advantages, kept):
    """`advantages(responses)`, 0 where `kept(response)` says so of a token."""

    def masked(responses):
        made = []
        for o, own in zip(responses, advantages(responses), strict=True):
            made.append(own * torch.tensor(kept(o), dtype=torch.float64))
        return made

    return masked


def weighed(cap, term):
    """Each token's surrogate by π_old / π_engine, at most the cap."""
    return lambda o, a: (o.old - o.engine).exp().clamp(max=cap) * term(o, a)


def same(name, settings, *arguments, **more):
    check(name, settings, *arguments, problem=Mismatched(), **more)


def test_tokens_out_of_bounds_have_no_policy_gradient_and_stay_in_the_denominator():
    def kept(o):
        return tokens_kept(o, 0.8, 1.3)

    bounds = {"engine_mask": "token", "engine_mask_low": 0.8, "engine_mask_high": 1.3}
    relative = without(formulae.group_relative, kept)
    same("grpo", {**bounds, "kl_beta": 0.1}, relative, with_kl(10, 10, 0.1), "sequence")
    same("dapo", bounds, relative, plain(0.2, 0.28), "token", (0.2, 0.28))
    icepop = {**bounds, "importance_cap": 1.3, "kl_beta": 0.0}
    same("grpo", icepop, relative, weighed(math.inf, plain(10, 10)), "sequence")
    normalized = without(lambda responses: formulae.reinforce_pp(responses, 0.01), kept)
    same("reinforce_pp", bounds, normalized, plain(0.2, 0.2), "token", (0.2, 0.2))
    loo = without(lambda responses: formulae.leave_one_out_and_kl(responses, 0.03), kept)
    same("rloo", bounds, loo, weighted_by_the_ratio, "constant")


def test_responses_out_of_bounds_have_no_policy_gradient():
    def kept(o):
        return responses_kept(o, 0.999, 1.001)

    problem = Mismatched()
    share = sum(all(kept(o)) for o in problem.responses) / len(problem.responses)
    assert 0.2 < share < 0.8, "a problem without both"
    relative = without(formulae.group_relative, kept)
    mask = {"engine_mask": "sequence"}
    same("grpo", {**mask, "kl_beta": 0.1}, relative, with_kl(10, 10, 0.1), "sequence")

    def gspo(o, a):
        return formulae.clipped(o, a[:1], 3e-4, 4e-4, formulae.sequence_ratio(o))

    same("gspo", mask, relative, gspo, "sequence", (3e-4, 4e-4))


def test_probabilities_far_from_the_engine_s_have_no_gradient_that_leads_further():
    low, high = 0.01, 0.005

    def term(o, a):
        kept = []
        for t in range(len(o)):
            rise = math.exp(o.new[t].item()) - math.exp(o.engine[t])
            kept.append(not ((a[t] > 0 and rise > high) or (a[t] < 0 and -rise > low)))
        return (o.new - o.engine).exp() * a * torch.tensor(kept, dtype=torch.float64)

    settings = {"engine_mask": "divergence", "engine_mask_low": low, "engine_mask_high": high}
    # DPPO: the ratio of the policy over the engine, hardly ever capped.
    dppo = {**settings, "importance_cap": 1e6, "kl_beta": 0.0}
    same("grpo", dppo, formulae.group_relative, term, "sequence")
    masked = 0
    for *_, terms, _ in ours(Mismatched(), "grpo", dppo):
        masked += sum(t.metrics["engine_mask/tokens"].total for t in terms).item()
    assert masked > 3


@pytest.mark.parametrize(("method", "name"), [("token", "tokens"), ("sequence", "responses")])
def test_shares_of_what_is_masked_are_counted(method, name):
    problem = Mismatched()
    kept = tokens_kept if method == "token" else responses_kept
    bounds = (0.8, 1.3) if method == "token" else (0.999, 1.001)
    keys = dict(zip(("engine_mask_low", "engine_mask_high"), bounds, strict=True))
    metrics = {}
    list(ours(problem, "grpo", {"engine_mask": method, **keys}, metrics=metrics))
    trained = [o for o in problem.responses if o.reward is not None]
    by_response = [kept(o, *bounds) for o in trained]
    every = [own for each in by_response for own in each]
    tokens, responses = metrics["engine_mask/tokens"], metrics["engine_mask/responses"]
    assert (float(tokens.total), float(tokens.count)) == (every.count(False), len(every))
    concerned = sum(not all(own) for own in by_response)
    assert (float(responses.total), float(responses.count)) == (concerned, len(trained))
    assert float(metrics[f"engine_mask/{name}"].total) > 0


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_without_a_mask_no_bit_changes(name):
    """The loss that a rank calls is the algorithm's own, and a mask of all is none."""
    algorithm = algorithms.find_algorithm(name)
    rl = Config(rl={"algorithm": name, "group_size": 4}).rl
    settings = rl.loss_settings(LIMIT)
    assert wrap_loss(algorithm.loss, settings) == (algorithm.loss, settings)
    assert rl.engine_mask not in MASK_FUNCTIONS
    if name == "gspo":
        return
    wide = {"engine_mask": "divergence", "engine_mask_low": 1.0, "engine_mask_high": 1.0}
    made = zip(ours(Mismatched(), name, {}), ours(Mismatched(), name, wide), strict=True)
    for (loss, gradient, *_), (same_loss, same_gradient, *_) in made:
        assert torch.equal(loss, same_loss) and torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("method", ["token", "sequence", "divergence"])
def test_a_micro_batch_without_responses_has_nothing_to_mask(method):
    empty = pack_batch([], TokenSplit(tensor_size=2), torch.device("cpu"))
    empty.logprobs |= {"old": torch.zeros(2), "ref": torch.zeros(2)}
    rl = {"engine_mask": method, "kl_estimator": "unbiased", "kl_beta": 0.1}
    settings = parse_recipe({"rl": rl}).rl
    if method in MASK_FUNCTIONS:
        rollout = RolloutBatches([empty])
        bounds = settings.engine_mask_settings
        metrics = rollout.mask_advantages(find_function(MASK_FUNCTIONS[method])(rollout, bounds))
        assert [float(each.count) for each in metrics.values()] == [0.0, 0.0]
    hidden = torch.ones(2, HIDDEN, requires_grad=True)
    weight = torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    head = LossHead(empty, hidden, weight, 1.0, None, VOCABULARY)
    name, settings = wrap_loss(
        algorithms.find_algorithm("grpo").loss, settings.loss_settings(LIMIT)
    )
    terms = find_function(name)(empty, head, settings)
    terms.loss.backward()
    assert terms.loss.item() == 0.0 and int(terms.denominator) == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_settings_reach_a_rank_as_they_are():
    settings = parse_recipe({"rl": {"engine_mask": "divergence"}}).rl.loss_settings(8)
    name, settings = wrap_loss("a:loss", settings)
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(settings), type=LossSettings)
    assert carried == settings and carried.inner == ("a:loss",)
    assert carried.engine_mask == EngineMaskSettings("divergence", 0.15, 0.15)
    assert name.endswith("engine_mask:divergence_loss")


@pytest.mark.parametrize(
    ("rl", "is_asked", "computes_all"),
    [
        ({}, False, False),
        ({"engine_mask": "token"}, True, True),
        ({"engine_mask": "sequence"}, True, True),
        ({"engine_mask": "divergence"}, False, False),
        ({"algorithm": "rloo"}, False, True),
    ],
)
def test_a_mask_needs_old_logprobs_of_every_mini_batch(rl, is_asked, computes_all):
    config, trainer = parse_recipe({"rl": rl}), SimpleNamespace(call=AsyncMock(return_value={}))
    policy_trainer = PolicyTrainer(config, trainer, RunState())
    asyncio.run(policy_trainer.compute_logprobs(config))
    assert trainer.call.await_args.kwargs["with_first_minibatch"] is computes_all
    trainer.call.reset_mock()
    asyncio.run(policy_trainer.mask_advantages(config))
    asked = [each.args for each in trainer.call.await_args_list]
    assert asked == [(ModelOperations.mask_advantages,)] * is_asked


@pytest.mark.parametrize(
    ("rl", "key", "cause"),
    [
        ({"engine_mask_low": 0.5}, "engine_mask_low", Cause.CONFLICT),
        ({"engine_mask_high": 2}, "engine_mask_high", Cause.CONFLICT),
        ({"engine_mask": "icepop"}, "engine_mask", Cause.UNKNOWN),
        ({"engine_mask": "token", "engine_mask_low": 1.1}, "engine_mask_low", Cause.OUT_OF_RANGE),
        ({"engine_mask": "token", "engine_mask_low": -1}, "engine_mask_low", Cause.OUT_OF_RANGE),
        (
            {"engine_mask": "sequence", "engine_mask_high": 0.9},
            "engine_mask_high",
            Cause.OUT_OF_RANGE,
        ),
        (
            {"engine_mask": "divergence", "engine_mask_high": 1.5},
            "engine_mask_high",
            Cause.OUT_OF_RANGE,
        ),
        (
            {"engine_mask": "divergence", "engine_mask_low": 0},
            "engine_mask_low",
            Cause.OUT_OF_RANGE,
        ),
        ({"algorithm": "gspo", "engine_mask": "token"}, "engine_mask", Cause.CONFLICT),
        ({"algorithm": "gspo", "engine_mask": "divergence"}, "engine_mask", Cause.CONFLICT),
    ],
)
def test_bounds_and_methods_without_a_meaning_are_refused(rl, key, cause):
    with refused(f"rl.{key}", cause):
        parse_recipe({"rl": rl})


def test_a_schedule_may_begin_a_mask():
    schedule = [{"from_step": 5, "rl.engine_mask": "token", "rl.engine_mask_high": 3.0}]
    parts = dict(parse_recipe({"rl": {"schedule": schedule}}).schedule_parts())
    assert parts[5].rl.engine_mask_settings == EngineMaskSettings("token", 0.5, 3.0)
