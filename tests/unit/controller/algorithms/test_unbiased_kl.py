"""DeepSeek-V3.2's estimate of KL against its formula in fp64, and its gradient against that of the
exact divergence."""

import math

import algorithm_formulae as formulae
import pytest
import torch
from algorithm_formulae import clipped, group_relative
from algorithm_problem import EXACT, HIDDEN, LIMIT, TEMPERATURE, VOCABULARY, Problem, check, ours
from refusals import refused
from test_branches import NEAR, Episodes

from megatron_r1.base.errors import Cause
from megatron_r1.base.user_code import find_function
from megatron_r1.config import parse_recipe
from megatron_r1.controller import algorithms
from megatron_r1.controller.corrections import wrap_loss
from megatron_r1.trainer.loss_head import LossHead
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

BETA = 0.3
SETTINGS = {"kl_estimator": "unbiased", "kl_beta": BETA}


def estimate(o):
    return (o.new - o.old).exp() * formulae.k3(o)


def term(low, high):
    return lambda o, a: clipped(o, a, low, high) - BETA * estimate(o)


def without_std(responses):
    return group_relative(responses, by_std=False)


def test_it_is_k3_times_the_ratio_with_the_gradient_of_both():
    check("grpo", SETTINGS, group_relative, term(10, 10), "sequence")
    narrow = {"clip_low": 0.2, "clip_high": 0.2}
    check("grpo", SETTINGS | narrow, group_relative, term(0.2, 0.2), "sequence", (0.2, 0.2))
    check("dapo", SETTINGS, group_relative, term(0.2, 0.28), "token", (0.2, 0.28))
    check("dr_grpo", SETTINGS, without_std, term(0.2, 0.2), "constant", (0.2, 0.2))

    def gspo(o, a):
        return clipped(o, a[:1], 3e-4, 4e-4, formulae.sequence_ratio(o)) - BETA * estimate(o)

    check("gspo", SETTINGS, group_relative, gspo, "sequence", (3e-4, 4e-4))


def test_branches_of_an_episode_have_it_as_one_response():
    arguments = group_relative, term(10, 10), "sequence"
    check("grpo", SETTINGS, *arguments, problem=Episodes(1, 3), near=NEAR)


def test_the_metrics_are_of_this_estimate_and_of_the_whole_loss():
    problem = Problem()
    made = ours(problem, "grpo", SETTINGS)
    for members, (loss, _, terms, _) in zip(problem.minibatches, made, strict=True):
        total = sum(t.metrics["loss"].total for t in terms) / sum(t.denominator for t in terms)
        assert float(total) == pytest.approx(float(loss), rel=1e-12)
        trained = [problem.responses[i] for i in members if problem.rewards[i] is not None]
        every = torch.cat([estimate(o).detach() for o in trained])
        kl = [t.metrics["kl"] for t in terms]
        assert float(sum(each.total for each in kl)) == pytest.approx(float(every.sum()), rel=1e-9)
        assert sum(int(each.count) for each in kl) == len(every)


def test_its_expected_gradient_is_that_of_the_divergence_after_updates_too():
    """All tokens once, which a policy that was uniform has sampled with equal frequency."""
    g = torch.Generator().manual_seed(3)
    state = torch.randn(HIDDEN, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64)
    reference = torch.randn(VOCABULARY, generator=g, dtype=torch.float64).log_softmax(-1)
    samples = [Sample.pack([1], [token], [0.0], 0.0) for token in range(VOCABULARY)]
    batch = pack_batch(samples, TokenSplit(), torch.device("cpu"))
    batch.advantages = batch.advantages.double()
    batch.logprobs["old"] = torch.full(
        (2 * VOCABULARY,), -math.log(VOCABULARY), dtype=torch.float64
    )
    batch.logprobs["ref"] = reference[batch.targets]
    head = LossHead(batch, state.expand(2 * VOCABULARY, -1), weight, TEMPERATURE, None, VOCABULARY)
    settings = parse_recipe({"rl": SETTINGS | {"kl_beta": 1.0}}).rl.loss_settings(LIMIT)
    name, settings = wrap_loss(algorithms.find_algorithm("grpo").loss, settings)
    terms = find_function(name)(batch, head, settings)
    (terms.loss / terms.denominator).backward()
    logprobs = (weight @ state / TEMPERATURE).log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (wanted,) = torch.autograd.grad(divergence, state)
    torch.testing.assert_close(state.grad, wanted, **EXACT)


def test_without_a_weight_of_kl_the_loss_is_the_algorithm_s():
    settings = parse_recipe({"rl": SETTINGS | {"kl_beta": 0.0}}).rl.loss_settings(LIMIT)
    plain = parse_recipe({"rl": {"kl_beta": 0.0}}).rl.loss_settings(LIMIT)
    assert wrap_loss("a:loss", settings) == ("a:loss", plain)
    made, same = (next(ours(Problem(), "grpo", {**own, "kl_beta": 0.0})) for own in (SETTINGS, {}))
    assert torch.equal(made[0], same[0]) and torch.equal(made[1], same[1])


def test_it_goes_together_with_a_mask_in_the_loss():
    settings = parse_recipe({"rl": SETTINGS | {"engine_mask": "divergence"}}).rl.loss_settings(
        LIMIT
    )
    name, settings = wrap_loss("a:loss", settings)
    assert [name.split(":")[0].split(".")[-1], *settings.inner] == [
        "engine_mask",
        "megatron_r1.controller.corrections.unbiased_kl:loss",
        "a:loss",
    ]


@pytest.mark.parametrize("name", ["rloo", "reinforce_pp", "ppo"])
def test_where_kl_is_in_the_reward_it_is_refused(name):
    with refused("rl.kl_estimator", Cause.CONFLICT, name):
        parse_recipe({"rl": {"algorithm": name, "kl_estimator": "unbiased"}})
