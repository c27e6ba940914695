"""Each algorithm, from rewards to the gradient of a packed mini-batch, against its formula."""

import math
import random
import re
from pathlib import Path

import algorithm_formulae as formulae
import pytest
import torch
from algorithm_problem import EXACT, Problem, check, ours, plain, weighted_by_the_ratio, with_kl

from megatron_r1.base.user_code import find_function
from megatron_r1.config import Config
from megatron_r1.config.algorithms import ALGORITHM_NAMES
from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.controller import algorithms
from megatron_r1.trainer.rollout_batches import RolloutBatches
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_advantages import discounted_sums
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample
from megatron_r1.trainer.whole_microbatch import WholeMicrobatch


def cispo(low, high):
    def term(o, a):
        ratio = (o.new - o.old).exp().clamp(1 - low, 1 + high).detach()
        return ratio * a * o.new

    return term


def test_grpo():
    check("grpo", {}, formulae.group_relative, with_kl(10, 10, 0.001), "sequence")
    narrow = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.04}
    check("grpo", narrow, formulae.group_relative, with_kl(0.2, 0.2, 0.04), "sequence", (0.2, 0.2))


def test_grpo_with_the_deviation_of_the_rollout():
    def advantages(responses):
        return formulae.over_rollout(responses, formulae.group_relative(responses, by_std=False))

    check("grpo", {"advantage_std": "batch"}, advantages, with_kl(10, 10, 0.001), "sequence")


def test_dapo():
    check("dapo", {}, formulae.group_relative, plain(0.2, 0.28), "token", (0.2, 0.28))


def test_dr_grpo():
    def advantages(responses):
        return formulae.group_relative(responses, by_std=False)

    check("dr_grpo", {}, advantages, plain(0.2, 0.2), "constant", (0.2, 0.2))


def test_gspo():
    def term(o, a):
        ratio = formulae.sequence_ratio(o)
        return formulae.clipped(o, a[:1], 3e-4, 4e-4, ratio)

    check("gspo", {}, formulae.group_relative, term, "sequence", (3e-4, 4e-4))


def test_cispo():
    narrow = {"clip_low": 0.2, "clip_high": 0.3}
    check("cispo", narrow, formulae.group_relative, cispo(0.2, 0.3), "token", (0.2, 0.3))
    check("cispo", {}, formulae.group_relative, cispo(10, 4), "token")


def test_reinforce():
    advantages = formulae.less_the_rollouts_mean
    check("reinforce", {}, advantages, weighted_by_the_ratio, "constant")

    def scaled(responses):
        return formulae.over_rollout(responses, advantages(responses))

    check("reinforce", {"advantage_std": "batch"}, scaled, weighted_by_the_ratio, "constant")


def test_rloo():
    for beta in (0.03, 0.0):

        def advantages(responses, beta=beta):
            return formulae.leave_one_out_and_kl(responses, beta)

        check("rloo", {"kl_beta": beta}, advantages, weighted_by_the_ratio, "constant")


def test_reinforce_pp():
    def advantages(responses):
        return formulae.reinforce_pp(responses, 0.01)

    check("reinforce_pp", {}, advantages, plain(0.2, 0.2), "token", (0.2, 0.2))


def test_ppo_normalizes_over_the_rollout_and_leaves_returns_for_the_critic():
    settings = {"kl_beta": 0.1, "gae_lambda": 0.9, "discount": 0.95}

    def advantages(responses):
        made, _ = formulae.gae(responses, 0.1, 0.95, 0.9)
        return formulae.normalized_over_tokens(responses, made)

    check("ppo", settings, advantages, plain(0.2, 0.2), "sequence", (0.2, 0.2))

    def as_they_are(responses):
        return formulae.gae(responses, 0.1, 0.95, 0.9)[0]

    whole = {**settings, "advantage_std": "none"}
    check("ppo", whole, as_they_are, plain(0.2, 0.2), "sequence", (0.2, 0.2))

    problem = Problem()
    _, returns = formulae.gae(problem.responses, 0.1, 0.95, 0.9)
    for step, (*_, batches) in enumerate(ours(problem, "ppo", settings)):
        graded = [i for i in problem.minibatches[step] if problem.rewards[i] is not None]
        wanted = torch.cat([returns[i] for i in graded])
        got = torch.cat([batch.returns[batch.is_response] for batch in batches])
        torch.testing.assert_close(got, wanted, **EXACT)


def test_on_policy_distillation_teaches_ungraded_responses_too():
    for discount in (0.0, 0.5, 1.0):

        def advantages(responses, discount=discount):
            return formulae.distillation(responses, discount)

        settings = {"discount": discount}
        check("on_policy_distillation", settings, advantages, weighted_by_the_ratio, "token")


def test_distillation_and_rloo_have_the_gradients_of_the_divergences_they_are_named_after():
    """All two-token responses at once, weighed by their probabilities: the algorithms' expected
    gradients are those of the exact divergences."""
    g = torch.Generator().manual_seed(4)
    first = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    second = torch.randn(4, 4, generator=g, dtype=torch.float64).requires_grad_()
    other = torch.log_softmax(torch.randn(4, generator=g, dtype=torch.float64), -1)
    others = torch.log_softmax(torch.randn(4, 4, generator=g, dtype=torch.float64), -1)
    p, q = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    joint = (p[:, None] + q).exp().detach()
    both = torch.stack([p[:, None].expand(4, 4), q])
    gaps = torch.stack([(p - other)[:, None].expand(4, 4), q - others]).detach()

    def gradients(value):
        return torch.cat(
            [x.flatten() for x in torch.autograd.grad(value, (first, second), retain_graph=True)]
        )

    def estimated(to_go):
        return gradients((joint * -(to_go * both).sum(0)).sum())

    # Over whole responses: rloo's penalties to go (β 1, no reward), distillation at discount 1.
    whole = ((p[:, None] + q).exp() * (p[:, None] + q - other[:, None] - others)).sum()
    to_go = torch.stack([gaps[0] + gaps[1], gaps[1]])
    torch.testing.assert_close(estimated(-to_go), gradients(whole), **EXACT)
    # Token by token, at the states that the old policy visits: distillation at discount 0.
    per_token = (p.exp() * (p - other)).sum()
    per_token = per_token + (p.exp().detach()[:, None] * q.exp() * (q - others)).sum()
    torch.testing.assert_close(estimated(-gaps), gradients(per_token), **EXACT)


def test_rewards_that_are_all_equal_are_normalized_to_0():
    batch = pack_batch(
        [Sample.pack([1], [2] * n, None, 0.7) for n in (1, 4, 9)], TokenSplit(), torch.device("cpu")
    )
    settings = TokenAdvantageSettings(0.0, 1.0, 1.0, "batch", advantage_epsilon=0.0)
    rollout = RolloutBatches([batch])
    rollout.store_targets(
        find_function(algorithms.find_algorithm("reinforce_pp").token_advantages)(rollout, settings)
    )
    assert batch.advantages.abs().max() < 1e-6


def test_a_group_of_equal_rewards_has_no_leave_one_out_advantage():
    rl = Config(rl={"algorithm": "rloo"}).rl
    third = 0.1 + 0.2
    equal, alone, mixed = algorithms.find_algorithm("rloo").outcome_advantages(
        [[third] * 7, [None, 0.4, None], [1.0, None, 0.0, 0.5]], rl
    )
    assert equal == [0.0] * 7
    assert alone[1] == 0.0 and math.isnan(alone[0]) and math.isnan(alone[2])
    assert mixed[0] == 0.75 and math.isnan(mixed[1]) and mixed[2:] == [-0.75, 0.0]


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.999, 1.0])
def test_discounted_sums_are_the_loop_s_of_any_length(discount):
    draw = random.Random(1)
    lengths = [1, 700, 0, 2, 3, 64, 65, 127, 1]
    made = [Sample.pack([1, 2], [3] * n) for n in lengths]
    batch = pack_batch(made, TokenSplit(tensor_size=8), torch.device("cpu"))
    values = [[draw.gauss(0, 1) for _ in range(n)] for n in lengths]
    whole = torch.full((batch.input_ids.shape[1],), math.nan, dtype=torch.float64)
    whole[batch.is_response] = torch.tensor(sum(values, []), dtype=torch.float64)
    responses = WholeMicrobatch(batch)
    got = discounted_sums(whole, discount, responses.is_response, responses.last_response_positions)
    wanted = sum([formulae.naive_sums(own, discount) for own in values], [])
    assert got[batch.is_response].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert (got[~batch.is_response] == 0).all()


def test_a_micro_batch_without_samples_is_left_as_it_is():
    batch = pack_batch([], TokenSplit(tensor_size=2), torch.device("cpu"))
    batch.logprobs["old"] = batch.logprobs["ref"] = torch.zeros(2)
    rollout = RolloutBatches([batch])
    settings = TokenAdvantageSettings(0.1, 1.0, 1.0, "batch", advantage_epsilon=1e-6)
    rollout.store_targets(
        find_function(algorithms.find_algorithm("reinforce_pp").token_advantages)(rollout, settings)
    )
    assert batch.advantages.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", sorted({*ALGORITHM_NAMES} - {"on_policy_distillation"}))
def test_rewards_that_are_no_numbers_are_refused(name):
    rl = Config(rl={"algorithm": name}).rl
    with pytest.raises(ValueError, match="inf"):
        algorithms.find_algorithm(name).outcome_advantages([[1.0, 0.0], [math.inf, 0.0]], rl)
    with pytest.raises(ValueError, match="reward"):
        algorithms.find_algorithm(name).outcome_advantages([[]], rl)


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_settings_may_come_as_a_mapping(name):
    """As from a user's function that calls ours with {**settings, …}."""
    problem = Problem()
    (loss, *_), (again, *_) = (next(ours(problem, name, {}, form)) for form in (dict, lambda s: s))
    assert torch.equal(loss, again)


def test_every_algorithm_is_compared_with_its_formula_here():
    calls = re.findall(r'\bcheck\(\s*"(\w+)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(calls) == set(ALGORITHM_NAMES)
