"""Losses and advantages: the reports of the area "loss"."""

import asyncio
import math

import pytest
import torch
from refusals import refused

from megatron_r1.base.errors import Cause, RunError
from megatron_r1.base.user_code import find_function
from megatron_r1.config import Config, parse_recipe
from megatron_r1.config.algorithms import ALGORITHM_NAMES
from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.controller import algorithms
from megatron_r1.controller.loop import split_into_minibatches
from megatron_r1.controller.rollouts.dynamic_sampling import collect_dynamic_rollout
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response
from megatron_r1.trainer.loss_head import LossHead
from megatron_r1.trainer.rollout_batches import RolloutBatches
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_advantages import (
    discounted_sums,
    gae,
    kl_penalized_rewards,
)
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

VOCABULARY, HIDDEN, LIMIT = 7, 4, 12


def graded(tokens, reward):
    response = Response(tokens, [-1.0] * len(tokens), [0] * len(tokens), "stop")
    known = 0.0 if reward is None else reward
    return GradedResponse(
        response, "", {"accuracy": known}, known, "", is_graded=reward is not None
    )


def terms_of(name, groups, settings, temperature=1.0, hidden=None, split=False):
    """Loss, gradient by the head's weight, and metrics of one update, from graded responses, as
    controller and trainer make them.

    Args:
        groups: (tokens, reward) of each response; the hidden state of a position follows from the
            token there.
        split: one micro-batch per sample."""
    rl = {"group_size": max(2, len(groups[0])), "minibatches": 1, **settings}
    config = Config(rl={"algorithm": name, **rl}, rollout={"max_response_tokens": LIMIT})
    algorithm = algorithms.find_algorithm(name)
    prompt = make_prompt("1 + 1?", "math", "2", {})
    made = [Group(prompt, [1, 2], [graded(*each) for each in group]) for group in groups]
    rewards = [[reward for _, reward in group] for group in groups]
    numbers = algorithm.outcome_advantages(rewards, config.rl)
    [samples] = split_into_minibatches(training_samples(made, numbers), 1)
    parts = [[sample] for sample in samples] if split else [samples]
    batches = [pack_batch(part, TokenSplit(), torch.device("cpu")) for part in parts]
    g = torch.Generator().manual_seed(0)
    states = torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64).requires_grad_()
    for batch in batches:
        shift = torch.linspace(-0.5, 0.5, VOCABULARY, dtype=torch.float64)[batch.targets]
        batch.logprobs["old"] = -1.5 - shift
        batch.logprobs["ref"] = -1.5 + shift
        batch.values = torch.zeros_like(shift)
    if algorithm.token_advantages is not None:
        rollout = RolloutBatches(batches)
        rollout.store_targets(
            find_function(algorithm.token_advantages)(rollout, config.rl.token_advantage_settings)
        )
    loss = find_function(algorithm.loss)
    terms = []
    for batch in batches:
        own = states[batch.input_ids[0]] if hidden is None else hidden
        head = LossHead(batch, own, weight, temperature, None, VOCABULARY)
        terms.append(loss(batch, head, config.rl.loss_settings(LIMIT)))
    count = sum(int(t.denominator) for t in terms)
    total = sum(t.loss for t in terms) / max(1, count)
    total.backward()
    return total.detach(), weight.grad, terms, count


CORRECT, INCORRECT = ([3, 4, 5], 1.0), ([4, 6, 2], 0.0)
LOST = [([5, 5, 1], None), ([2, 3, 4, 6, 1], None)]


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", sorted({*ALGORITHM_NAMES} - {"on_policy_distillation"}))
def test_b01_an_ungraded_response_is_in_no_sum_and_no_denominator(name, average):
    rl = {"kl_beta": 0.001, "entropy_coef": 0.01, "loss_average": average}
    alone, wanted, alone_terms, alone_count = terms_of(name, [[CORRECT, INCORRECT]], rl)
    assert wanted.abs().max() > 1e-3
    for lost in (LOST, LOST[:1]):
        loss, gradient, terms, count = terms_of(name, [[CORRECT, *lost, INCORRECT]], rl)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, alone, rtol=1e-9, atol=1e-12)
        assert count == alone_count
        for metric in ("kl", "entropy", "clip_fraction"):
            got, expected = terms[0].metrics[metric], alone_terms[0].metrics[metric]
            assert float(got.total) == pytest.approx(float(expected.total))
            assert int(got.count) == int(expected.count) == 6


def test_b01_graded_responses_are_spread_over_the_mini_batches():
    """Else a mini-batch might have none, and its update only the optimizer's momentum."""
    numbers = [math.nan] * 5 + [0.5, -0.5, 1.0]
    samples = [[Sample.pack([1], [2], [0.0], number)] for number in numbers]
    for count, wanted in ((1, [3]), (2, [1, 2]), (3, [1, 1, 1])):
        got = split_into_minibatches(samples, count)
        assert [sum(each.is_trained for each in batch) for batch in got] == wanted
        assert {len(batch) for batch in got} == {len(samples) // count}


@pytest.mark.parametrize("count", [1, 2])
def test_b02_a_step_without_a_grade_stops_before_its_updates(count):
    samples = [[Sample.pack([1], [2], [0.0], math.nan)] for _ in range(4)]
    with pytest.raises(RunError, match="rl.minibatches"):
        split_into_minibatches(samples, count)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_b02_a_micro_batch_without_a_response_token_adds_exact_zeros(average):
    made = [Sample.pack([1, 2], [3, 4], [-1.0] * 2, math.nan), Sample.pack([1], [2], [-1.0], 1.0)]
    settings = Config(rl={"kl_beta": 0.1, "entropy_coef": 0.1, "loss_average": average}).rl
    for samples, num in ((made[:1], 0), (made, 1)):
        batch = pack_batch(samples, TokenSplit(), torch.device("cpu"))
        batch.logprobs["ref"] = torch.zeros(len(batch.targets))
        weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
        head = LossHead(
            batch, torch.randn(len(batch.targets), HIDDEN), weight, 1.0, None, VOCABULARY
        )
        grpo = find_function(algorithms.find_algorithm("grpo").loss)
        terms = grpo(batch, head, settings.loss_settings(LIMIT))
        terms.loss.backward()
        assert int(terms.denominator) == num
        assert weight.grad.isfinite().all() and bool(weight.grad.abs().max() > 0) == bool(num)
        assert math.isfinite(float(terms.loss.detach()))


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_b03_loss_and_gradient_do_not_depend_on_micro_batches(average):
    """Over ranks: tests/parallel/test_trainer.py."""
    groups = [[([3], 1.0), ([4, 5, 6], 0.0)], [([2, 2, 1], 0.2), ([1, 1], 0.7)]]
    rl = {"loss_average": average}
    loss, gradient, *_ = terms_of("grpo", groups, rl)
    apart, wanted, *_ = terms_of("grpo", groups, rl, split=True)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, apart, rtol=1e-9, atol=1e-12)


def advantages_of(name, rewards, **settings):
    rl = {"group_size": len(rewards), "minibatches": 1, **settings}
    config = Config(rl={"algorithm": name, **rl})
    return algorithms.find_algorithm(name).outcome_advantages([rewards], config.rl)[0]


@pytest.mark.parametrize("epsilon", [1e-6, 0.0])
@pytest.mark.parametrize("base", [0.35, 0.1 + 0.2, 1e6])
def test_b04_the_odd_one_of_a_group_gets_its_z_score(base, epsilon):
    odd = [base] * 7 + [base + 0.65]
    wanted = [-(7**-0.5)] * 7 + [7**0.5]
    got = advantages_of("grpo", odd, advantage_epsilon=epsilon)
    assert got == pytest.approx(wanted, rel=1e-4)
    assert advantages_of("rloo", odd) == pytest.approx([-0.65 / 7] * 7 + [0.65], rel=1e-4)


EQUAL = [
    [0.1 + 0.2, 0.3],
    [0.1 + 0.2] * 7 + [0.3],
    [0.7 + 0.1, 0.8],
    [0.1 * 3 - 0.3, 0.0],  # terms of opposite sign leave 5.6e-17
    [1e9 + 0.1 + 0.2, 1e9 + 0.3],
    [0.30000001192092896, 0.3],  # 0.3 as a float32
    [-0.1 - 0.2, -0.3],
    [0.5, 0.5],
]
DIFFERENT = [[0.3, 0.3001], [0.0, 1e-6], [1.0, 1.0078125], [1e9, 1e9 + 1e4], [-1.0, 1.0]]


@pytest.mark.parametrize("rewards", EQUAL)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce"])
def test_b05_rewards_apart_by_rounding_are_equal(name, rewards):
    assert advantages_of(name, rewards, advantage_epsilon=0.0) == [0.0] * len(rewards)
    assert advantages_of(name, [*rewards, None], advantage_epsilon=0.0)[:-1] == [0.0] * len(rewards)


def groups_of(rewards):
    prompt = make_prompt("1 + 1?", "math", "2", {})
    return Group(prompt, [1], [graded([1], reward) for reward in rewards])


def test_b05_dynamic_sampling_replaces_groups_apart_by_rounding():
    queue = [groups_of(rewards) for rewards in (*EQUAL, *DIFFERENT)]

    async def collect(prompts):
        return Rollout([queue.pop(0) for _ in prompts], 0.0, 0.0)

    got = asyncio.run(collect_dynamic_rollout(collect, lambda count: [None] * count, 5, 99))
    assert [[r.reward for r in group.responses] for group in got.groups] == DIFFERENT
    assert len(got.filtered_groups) == len(EQUAL)


def test_b06_small_differences_of_rewards_reach_the_z_score():
    got = advantages_of("grpo", [1, 1, 1, 1.0078125], advantage_epsilon=0.0)
    assert got == pytest.approx([-(3**-0.5)] * 3 + [3**0.5], rel=1e-9)
    # 1 / 256 apart: in bfloat16, where 1.00390625 rounds to 1, all four would be equal.
    got = advantages_of("grpo", [1, 1, 1, 1.00390625], advantage_epsilon=0.0)
    assert got == pytest.approx([-(3**-0.5)] * 3 + [3**0.5], rel=1e-9)


@pytest.mark.parametrize("rewards", [[1, 0, None, 1], [None, 0.2, 0.2, 0.7], [3, None, None, -1]])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce"])
def test_b07_siblings_have_the_advantages_of_the_smaller_group(name, rewards):
    known = [reward for reward in rewards if reward is not None]
    got = advantages_of(name, rewards)
    alone = iter(advantages_of(name, known))
    for reward, advantage in zip(rewards, got, strict=True):
        assert math.isnan(advantage) if reward is None else advantage == next(alone)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_b08_a_reward_that_is_no_number_is_refused_by_name(number):
    with pytest.raises(ValueError, match="finite"):
        advantages_of("grpo", [1.0, number, 0.0, 0.5])


@pytest.mark.parametrize("mask", [[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0]])
def test_b09_the_return_passes_over_given_tokens(mask):
    """reinforce_pp's sums and GAE with λ 1, at discount 1, a final reward of 1 and values of 0."""
    sampled = torch.tensor(mask, dtype=torch.bool)
    last = torch.full((len(mask),), max(i for i, m in enumerate(mask) if m))
    rewards = kl_penalized_rewards(torch.ones(len(mask)), None, 0.0, sampled, last)
    assert discounted_sums(rewards, 1.0, sampled, last).tolist() == mask
    made, targets = gae(rewards, torch.zeros(len(mask)), 1.0, 1.0, sampled, last)
    assert made.tolist() == targets.tolist() == mask


@pytest.mark.parametrize(("beta", "moves"), [(0.0, False), (0.01, True)])
def test_b12_equal_rewards_move_the_policy_through_kl_alone(beta, moves):
    groups = [[([3, 4], 1.0), ([5, 6, 1], 1.0)]]
    loss, gradient, terms, _ = terms_of("grpo", groups, {"kl_beta": beta})
    assert bool(gradient.abs().max() > 0) == bool(loss != 0) == moves
    if moves:  # the metric shows which
        assert float(terms[0].metrics["kl"].total) > 0


def test_b13_entropy_is_that_of_the_logits_over_the_temperature():
    """Logits [0, 0, ln 2] at 0.5: probabilities 1/6, 1/6, 4/6, entropy 0.8676 nats."""
    batch = pack_batch([Sample.pack([0], [2], [-1.0], 0.0)], TokenSplit(), torch.device("cpu"))
    settings = Config(rl={"kl_beta": 0.0, "entropy_coef": 1.0}).rl.loss_settings(LIMIT)
    logits = torch.tensor([0.0, 0.0, math.log(2)], dtype=torch.float64)

    def measured(logits):
        hidden = torch.eye(1, 1, dtype=torch.float64).expand(2, 1).contiguous()
        weight = logits[:, None].clone().requires_grad_()
        terms = find_function(algorithms.find_algorithm("grpo").loss)(
            batch, LossHead(batch, hidden, weight, 0.5, None, 3), settings
        )
        terms.loss.backward()
        return terms, weight.grad[:, 0]

    terms, gradient = measured(logits)
    wanted = 2 / 6 * math.log(6) + 4 / 6 * math.log(6 / 4)
    assert float(terms.metrics["entropy"].total) == pytest.approx(wanted, rel=1e-6)
    # A positive coefficient lowers the loss where entropy rises.
    assert float(terms.loss) == pytest.approx(-wanted, rel=1e-6)
    step = 1e-4
    for i in range(3):
        up, down = (measured(logits + sign * step * torch.eye(3)[i])[0].loss for sign in (1, -1))
        assert float(gradient[i]) == pytest.approx(float(up - down) / (2 * step), abs=1e-4)


def test_b14_the_distillation_loss_does_not_depend_on_micro_batches():
    def made(split):
        algorithm = algorithms.find_algorithm("on_policy_distillation")
        samples = [
            Sample.pack([1, 2], tokens, [-1.0] * len(tokens), teacher_logprobs=[-0.5] * len(tokens))
            for tokens in ([3], [4, 5, 6], [2, 2], [1] * 5)
        ]
        parts = [[sample] for sample in samples] if split else [samples]
        batches = [pack_batch(part, TokenSplit(), torch.device("cpu")) for part in parts]
        for batch in batches:
            batch.logprobs["old"] = -1.0 - 0.1 * batch.targets.float()
        rollout = RolloutBatches(batches)
        settings = TokenAdvantageSettings(0.0, 0.0, 1.0, "none", advantage_epsilon=0.0)
        rollout.store_targets(find_function(algorithm.token_advantages)(rollout, settings))
        rl = Config(rl={"algorithm": "on_policy_distillation"}).rl
        g = torch.Generator().manual_seed(1)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=g).double().requires_grad_()
        states = torch.randn(VOCABULARY, HIDDEN, generator=g).double()
        terms = []
        for batch in batches:
            head = LossHead(batch, states[batch.input_ids[0]], weight, 1.0, None, VOCABULARY)
            terms.append(find_function(algorithm.loss)(batch, head, rl.loss_settings(LIMIT)))
        total = sum(t.loss for t in terms) / sum(t.denominator for t in terms)
        total.backward()
        return total.detach(), weight.grad

    (loss, gradient), (apart, wanted) = made(False), made(True)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss, apart, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "reinforce"])
def test_b11_k1_in_the_loss_is_refused(name):
    rl = {"algorithm": name, "kl_estimator": "k1", "group_size": 4}
    with refused("rl.kl_estimator", Cause.CONFLICT, "k1", "0.1", "k2"):
        parse_recipe({"rl": {**rl, "kl_beta": 0.1}})
    with refused("rl.schedule", Cause.CONFLICT, "k1"):
        parse_recipe(
            {"rl": {**rl, "kl_beta": 0.0, "schedule": [{"from_step": 3, "rl.kl_beta": 0.1}]}}
        )
    assert parse_recipe({"rl": {**rl, "kl_beta": 0.0}}).rl.kl_estimator == "k1"  # a metric
    assert parse_recipe({"rl": {**rl, "algorithm": "rloo"}}).rl.kl_beta > 0  # k1 in the reward


@pytest.mark.parametrize(("estimator", "target"), [("k2", "reverse"), ("k3", "forward")])
def test_b11_the_other_estimators_have_the_expected_gradients_of_divergences(estimator, target):
    """All three tokens, weighed by their probabilities."""
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.5, 0.3], dtype=torch.float64), -1)
    policy = torch.log_softmax(logits, -1)
    reverse = (policy.exp() * (policy - ref)).sum()
    forward = (ref.exp() * (ref - policy)).sum()
    [wanted] = torch.autograd.grad(reverse if target == "reverse" else forward, logits)
    settings = Config(rl={"kl_beta": 1.0, "kl_estimator": estimator}).rl.loss_settings(LIMIT)
    got = torch.zeros(3, dtype=torch.float64)
    for token, weight in enumerate(policy.detach().exp()):
        batch = pack_batch(
            [Sample.pack([0], [token], [-1.0], 0.0)], TokenSplit(), torch.device("cpu")
        )
        batch.logprobs["ref"] = torch.stack([ref[token], torch.zeros(()).double()])
        head_weight = logits.detach()[:, None].clone().requires_grad_()
        head = LossHead(batch, torch.ones(2, 1).double(), head_weight, 1.0, None, 3)
        find_function(algorithms.find_algorithm("grpo").loss)(batch, head, settings).loss.backward()
        got += weight * head_weight.grad[:, 0]
        if estimator == "k2":  # that of ρ k3, the importance-weighted estimate, at ρ = 1
            logprob = torch.log_softmax(logits, -1)[token]
            g = ref[token] - logprob
            weighted = (logprob - logprob.detach()).exp() * (g.exp() - g - 1)
            [one] = torch.autograd.grad(weighted, logits)
            torch.testing.assert_close(head_weight.grad[:, 0], one, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
