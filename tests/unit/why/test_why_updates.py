"""The updates that `why` makes again: their loss against the trainer's kernels' in float64, their
optimizer against torch's AdamW."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from r1_kernels.policy_terms import PolicySettings, TokenTensors
from r1_kernels.primitives.policy_torch import policy_terms

from megatron_r1.config import parse_recipe
from megatron_r1.config.algorithms import find_rules
from megatron_r1.trainer.token_advantages import (
    discounted_sums,
    kl_penalized_rewards,
    standardize,
    sums_for_standardization,
)
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.update.adam import Adam, AdamRules
from megatron_r1.why.update.loss_formulas import LossRules
from megatron_r1.why.update.recomputation import Recomputation
from megatron_r1.why.update.recomputed_token_advantages import with_token_advantages
from megatron_r1.why.update.step_updates import StepUpdates

VOCABULARY, WIDTH = 11, 6
RULES = LossRules(
    average="sequence",
    constant_length=20,
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=None,
    is_sequence_ratio=False,
    is_cispo=False,
    importance_cap=None,
    kl_beta=0.05,
    kl_estimator="k3",
    entropy_coef=0.0,
    temperature=0.8,
)
ADAM = AdamRules((1e-3, 2e-3), 0.9, 0.95, 1e-8, 0.1, 0.05)
LENGTHS = ((2, 5), (3, 1), (2, 7), (4, 3))
"""Tokens of the prompt, and of the response."""
CASES = {
    "ppo": RULES,
    "token": replace(RULES, average="token"),
    "constant": replace(RULES, average="constant"),
    "k1": replace(RULES, kl_estimator="k1"),
    "k2": replace(RULES, kl_estimator="k2"),
    "dual_clip": replace(RULES, dual_clip=1.1),
    "cispo": replace(RULES, is_cispo=True),
    "importance": replace(RULES, importance_cap=1.2),
    "sequence_ratio": replace(RULES, is_sequence_ratio=True, clip_low=0.01, clip_high=0.01),
}


class Model(torch.nn.Module):
    """A token's logits depend on the token before it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.head(self.norm(self.embedding(input_ids))))


def rows() -> list[TokenRow]:
    draw = torch.Generator().manual_seed(3)
    made = []
    for number, (prompt, response) in enumerate(LENGTHS):
        count = prompt + response
        ids = torch.randint(VOCABULARY, (count,), generator=draw)
        floats = -torch.rand(response, generator=draw)
        sampled = torch.arange(count) >= prompt
        made.append(TokenRow(ids, sampled, floats, number, (-1.0) ** number * 0.7, response))
    return made


def apart(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """A model with other weights."""
    other = Model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def by_kernels(
    own: torch.Tensor, row: TokenRow, old: torch.Tensor, reference: torch.Tensor, loss: LossRules
):
    """The terms of a response by the trainer's formulae."""
    count = len(own)
    weight = {"sequence": 1 / count, "token": 1.0, "constant": 1 / loss.constant_length}[
        loss.average
    ]
    ratio = (own - old).mean().expand(count) if loss.is_sequence_ratio else None
    settings = PolicySettings(
        loss.clip_low,
        loss.clip_high,
        loss.dual_clip,
        loss.kl_beta,
        loss.kl_estimator,
        loss.importance_cap,
        "cispo" if loss.is_cispo else "ppo",
    )
    engine = row.logprobs.double() if loss.importance_cap is not None else None
    advantages = torch.full((count,), row.advantage, dtype=torch.float64)
    weights = torch.full((count,), weight, dtype=torch.float64)
    tokens = TokenTensors(own, old, reference, engine, advantages, weights, ratio)
    return policy_terms(tokens, settings)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_trainers(name):
    loss, given = CASES[name], rows()
    torch.manual_seed(1)
    model = Model()
    old, reference = (
        sampled_logprobs(apart(model, scale), given, [loss.temperature])[0] for scale in (0.1, 0.3)
    )
    own = sampled_logprobs(model, given, [loss.temperature])[0]
    terms = [by_kernels(*each, loss) for each in zip(own, given, old, reference, strict=True)]
    count = sum(map(len, own)) if loss.average == "token" else len(given)
    made = StepUpdates(model, None, 0, given, old, reference)
    (update,) = made.run([range(len(given))], loss, replace(ADAM, learning_rates=(0.0,)))
    num_tokens = sum(map(len, own))
    assert update.metrics["loss"] == pytest.approx(
        sum(float(each.loss.sum()) for each in terms) / count, rel=1e-9
    )
    assert update.metrics["kl"] == pytest.approx(
        sum(float(each.kl.sum()) for each in terms) / num_tokens, rel=1e-9
    )
    clipped = sum(float(each.clipped.sum()) for each in terms) / num_tokens
    assert clipped > 0 and update.metrics["clip_fraction"] == pytest.approx(clipped)
    largest = max(float(each.ratio.max()) for each in terms)
    assert update.metrics["ratio/max"] == pytest.approx(largest, rel=1e-9)


def test_a_cut_is_a_softmax_over_the_kept_ids():
    """Log-probabilities, entropy and gradient by torch's Categorical over the kept logits alone."""
    loss = replace(RULES, kl_beta=0.0, entropy_coef=0.1, clip_low=10.0, clip_high=10.0)
    draw = torch.Generator().manual_seed(5)
    given, kept = [], []
    for row in rows():
        own = [
            {int(token), *torch.randperm(VOCABULARY, generator=draw)[: 1 + at % 4].tolist()}
            for at, token in enumerate(row.token_ids[row.is_sampled])
        ]
        kept.append([torch.tensor(sorted(ids)) for ids in own])
        counts = torch.tensor([len(ids) for ids in own])
        given.append(replace(row, kept_ids=(counts, torch.cat(kept[-1]))))
    torch.manual_seed(1)
    model = Model()
    twin = Model()
    twin.load_state_dict(model.state_dict())
    old = sampled_logprobs(apart(model, 0.1), given, [loss.temperature])[0]
    total, entropies = torch.zeros((), dtype=torch.float64), []
    found = sampled_logprobs(model, given, [loss.temperature])[0]
    for at, row in enumerate(given):
        logits = twin(row.token_ids[None], use_cache=False).logits[0, :-1][row.is_sampled[1:]]
        tokens = row.token_ids[row.is_sampled]
        policies = [
            torch.distributions.Categorical(logits=each[ids].double() / loss.temperature)
            for each, ids in zip(logits, kept[at], strict=True)
        ]
        own = torch.stack(
            [
                policy.log_prob((ids == token).nonzero()[0, 0])
                for policy, ids, token in zip(policies, kept[at], tokens, strict=True)
            ]
        )
        torch.testing.assert_close(found[at], own.detach())
        entropies += [policy.entropy().detach() for policy in policies]
        entropy = torch.stack([policy.entropy() for policy in policies])
        gain = row.advantage * (own - old[at]).exp() + loss.entropy_coef * entropy
        total = total - gain.mean() / len(given)
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    made = StepUpdates(model, None, 0, given, old, None)
    (update,) = made.run([range(len(given))], loss, replace(ADAM, learning_rates=(0.0,)))
    assert update.metrics["loss"] == pytest.approx(float(total.detach()), abs=1e-7)
    assert update.metrics["entropy"] == pytest.approx(float(torch.stack(entropies).mean()))
    assert update.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_a_token_that_was_not_kept_has_no_logprob():
    row = rows()[0]
    nothing = torch.zeros(int(row.is_sampled.sum()), dtype=torch.int64)
    with pytest.raises(CannotRecompute, match="kept"):
        sampled_logprobs(Model(), [replace(row, kept_ids=(nothing, nothing[:0]))], [1.0])


def test_the_optimizer_is_torchs_adamw():
    """Two updates, from moments that earlier ones have left."""
    given = rows()
    torch.manual_seed(1)
    model, reference = Model(), Model()
    twin = Model()
    twin.load_state_dict(model.state_dict())
    matrices = {"params": [p for p in twin.parameters() if p.dim() > 1]}
    vectors = {"params": [p for p in twin.parameters() if p.dim() == 1], "weight_decay": 0.0}
    inner = torch.optim.AdamW([matrices, vectors], 1.0, (0.9, 0.95), 1e-8, 0.1)
    loss = replace(RULES, kl_beta=0.0, clip_low=10.0, clip_high=10.0)
    old = sampled_logprobs(model, given, [loss.temperature])[0]
    kl = sampled_logprobs(reference, given, [loss.temperature])[0]
    batches = ([0, 1], [2, 3])

    def step(indices, rate: float) -> float:
        """One update of the twin, in plain torch; returns the norm of its gradient."""
        total = torch.zeros(())
        for at in indices:
            row = given[at]
            logits = twin(row.token_ids[None], use_cache=False).logits[0, :-1][row.is_sampled[1:]]
            picked = (logits / loss.temperature).log_softmax(-1)
            picked = picked.gather(1, row.token_ids[row.is_sampled][:, None])[:, 0]
            ratio = (picked - old[at].float()).exp()
            total = total - row.advantage * ratio.mean() / len(indices)
        inner.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), ADAM.clip_grad)
        for group in inner.param_groups:
            group["lr"] = rate
        inner.step()
        return float(norm)

    first = StepUpdates(model, None, 0, given, old, kl)
    updates = first.run(batches, loss, ADAM)
    norms = [step(*each) for each in zip(batches, ADAM.learning_rates, strict=True)]
    assert min(norms) > ADAM.clip_grad, "the gradient is clipped"
    assert [each.metrics["grad_norm"] for each in updates] == pytest.approx(norms, rel=1e-5)
    for name, own in model.named_parameters():
        torch.testing.assert_close(own, dict(twin.named_parameters())[name], rtol=1e-5, atol=1e-7)


def test_a_response_has_the_same_logprobs_alone_and_in_a_batch():
    given = rows()
    model = Model()
    together = sampled_logprobs(model, given, [1.0])[0]
    for row, own in zip(given, together, strict=True):
        torch.testing.assert_close(sampled_logprobs(model, [row], [1.0])[0][0], own)
        assert len(own) == int(row.is_sampled.sum())


def test_a_decay_of_all_in_the_gradient_is_torchs_adam():
    parameters = {"weight": torch.randn(3, 2), "bias": torch.randn(2)}
    twins = [each.clone().requires_grad_() for each in parameters.values()]
    inner = torch.optim.Adam(twins, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    rules = replace(ADAM, clip_grad=9.0, decays_all=True, decays_by_gradient=True)
    adam = Adam(parameters, None, 0)
    for index in range(2):
        gradients = {name: torch.randn_like(each) for name, each in parameters.items()}
        adam.step(gradients, rules, index)
        inner.param_groups[0]["lr"] = rules.learning_rates[index]
        for twin, gradient in zip(twins, gradients.values(), strict=True):
            twin.grad = gradient.clone()
        inner.step()
    for own, twin in zip(parameters.values(), twins, strict=True):
        torch.testing.assert_close(own, twin.detach())


def test_a_known_norm_takes_the_place_of_the_gradients():
    """Of a gradient with a part elsewhere, the norm of the whole decides how it is clipped."""
    for norms, scale in (((4.0, 4.0), 0.25), ((0.5, 0.5), 1.0)):
        adam = Adam({"weight": torch.zeros(2)}, None, 0)
        rules = replace(ADAM, clip_grad=1.0, norms=norms)
        assert adam.step({"weight": torch.ones(2)}, rules, 0) == norms[0]
        torch.testing.assert_close(adam.first_moments["weight"], torch.full((2,), 0.1 * scale))


def step_of(rl: dict, **sections: dict) -> SimpleNamespace:
    config = parse_recipe({"rl": rl, **sections})
    return SimpleNamespace(
        config=config,
        run_config=config,
        rules=find_rules(config.rl.algorithm),
        sequences=[],
        checkpoint_before="a checkpoint",
    )


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_pp"])
def test_advantages_of_tokens_are_the_trainers(algorithm):
    given, draw = rows(), torch.Generator().manual_seed(7)
    old, reference = (
        [-torch.rand(row.num_sampled, generator=draw).double() for row in given] for _ in range(2)
    )
    step = step_of({"algorithm": algorithm, "kl_beta": 0.2, "discount": 0.9})
    made = with_token_advantages(step, given, old, reference)
    counts = torch.tensor([row.num_sampled for row in given])
    last = (counts.cumsum(0) - 1).repeat_interleave(counts)
    mask = torch.ones(len(last), dtype=torch.bool)
    rewards = torch.tensor([row.advantage for row in given]).double().repeat_interleave(counts)
    ratio = torch.cat(old) - torch.cat(reference)
    expected = discounted_sums(
        kl_penalized_rewards(rewards, ratio, 0.2, mask, last), 0.9, mask, last
    )
    if algorithm == "reinforce_pp":
        expected = standardize(
            expected, sums_for_standardization(expected), step.config.rl.advantage_epsilon
        )
    torch.testing.assert_close(torch.cat([row.token_advantages for row in made]), expected)


@pytest.mark.parametrize("mask", ["token", "sequence"])
def test_masked_tokens_have_no_advantage(mask):
    given = rows()
    old = [row.logprobs.double() for row in given]
    old[0] = old[0] + torch.tensor([0.0, 3.0, 0.0, 0.0, -3.0])  # the mean is 0
    made = with_token_advantages(step_of({"engine_mask": mask}), given, old, None)
    assert all(bool((row.token_advantages == row.advantage).all()) for row in made[1:])
    kept = [True, False, True, True, False] if mask == "token" else [True] * 5
    assert (made[0].token_advantages != 0).tolist() == kept


def test_updates_without_an_own_formula_are_not_made_again():
    step = step_of({"routing_replay": True}, model={"expert_bias_update_rate": 1e-3})
    with pytest.raises(CannotRecompute, match=r"rl.routing_replay with model"):
        Recomputation(step).inputs.check_updates()
