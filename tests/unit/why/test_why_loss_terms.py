"""How often each term of the loss is in the run's gradient.

Faults are planted in a run of plain torch in float64, whose terms are written out and whose
optimizer is torch's."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_why import marked_ungraded, planted  # noqa: F401
from test_why_updates import ADAM, RULES, Model, apart, rows, step_of

from megatron_r1.config import parse_recipe
from megatron_r1.why.checks.departing_terms import GRADIENT_REMEDY, compare_terms
from megatron_r1.why.comparison import ROUNDING_BY_DTYPE, CannotRecompute
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.update.loss_terms import LossTerm, left_out_terms, loss_terms
from megatron_r1.why.update.recomputation import Recomputation
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.term_coefficients import FirstMoments, fit_coefficients, fit_run
from megatron_r1.why.update.term_gradients import TermGradients

LOSS = replace(RULES, kl_beta=0.5, entropy_coef=0.2, clip_low=10.0, clip_high=10.0)
POLICY = LossTerm("the policy term", "policy", "advantages", frozenset({0, 3}))
TRUNCATED = LossTerm("the truncated part", "policy", "rl.truncated", frozenset({1, 2}))
KL = LossTerm("the KL term", "kl", "rl.kl_beta", frozenset(range(4)))
ENTROPY = LossTerm("the entropy term", "entropy", "rl.entropy_coef", frozenset(range(4)))
TERMS = (POLICY, TRUNCATED, KL, ENTROPY)
ORDERS = {1: ([0, 1, 2, 3],), 2: ([0, 1], [2, 3])}


class Run:
    """Policies and log-probabilities of a step, and a run of it in plain torch."""

    def __init__(self, clip: float = 0.05) -> None:
        torch.manual_seed(1)
        self.rows, self.model, self.clip = rows(), Model(), clip
        temperatures = [LOSS.temperature]
        self.old = sampled_logprobs(self.model, self.rows, temperatures)[0]
        self.reference = sampled_logprobs(apart(self.model, 0.3), self.rows, temperatures)[0]
        self.twin = Model().double()
        self.twin.load_state_dict(self.model.state_dict())
        parameters = list(self.twin.parameters())
        self.inner = torch.optim.AdamW(parameters, 1e-3, (ADAM.beta1, ADAM.beta2), 1e-8, 0.1)
        for parameter in parameters:  # of earlier updates
            self.inner.state[parameter] = {
                "step": torch.tensor(3.0),
                "exp_avg": 0.01 * torch.randn_like(parameter),
                "exp_avg_sq": 1e-4 * torch.rand_like(parameter),
            }
        self.before = self.moments("exp_avg"), self.moments("exp_avg_sq")

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        named = self.twin.named_parameters()
        return {key: self.inner.state[each][name].float().clone() for key, each in named}

    def loss(self, indices: list[int], term: LossTerm) -> torch.Tensor:
        """A term of an update's loss, from its definition."""
        total = torch.zeros((), dtype=torch.float64)
        for at in indices:
            row = self.rows[at]
            logits = self.twin(row.token_ids[None], use_cache=False).logits
            logits = logits[0, :-1][row.is_sampled[1:]] / LOSS.temperature
            policy = torch.distributions.Categorical(logits=logits)
            own = policy.log_prob(row.token_ids[row.is_sampled])
            gap = self.reference[at] - own
            value = {
                "policy": -row.advantage * (own - self.old[at]).exp(),
                "kl": LOSS.kl_beta * (gap.exp() - gap - 1),
                "entropy": -LOSS.entropy_coef * policy.entropy(),
            }[term.part]
            total = total + (value.mean() if at in term.rows else 0.0) / len(indices)
        return total

    def step(self, order, coefficients: dict[str, float]) -> float:
        """Make the updates with some coefficients; the mean norm of the gradients."""
        norms = []
        for indices, rate in zip(order, ADAM.learning_rates, strict=False):
            self.inner.zero_grad()
            sum(coefficients.get(t.name, 1.0) * self.loss(indices, t) for t in TERMS).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.twin.parameters(), self.clip)))
            self.inner.param_groups[0]["lr"] = rate
            self.inner.step()
        return sum(norms) / len(norms)

    def recomputed(self, order, terms, coefficients=None, norms=None) -> TermGradients:
        model = Model()
        model.load_state_dict(self.model.state_dict())
        updates = StepUpdates(model, self.before, 3, self.rows, self.old, self.reference)
        gradients = TermGradients(terms, coefficients)
        rules = replace(ADAM, clip_grad=self.clip, norms=norms, decays_all=True)
        updates.run(order, LOSS, rules, terms=gradients)
        return gradients

    def first_moments(self, order) -> FirstMoments:
        return FirstMoments(self.before[0], self.moments("exp_avg"), ADAM.beta1 ** len(order))

    def fit(self, order, norm: float, terms=TERMS):
        return fit_run(
            self.recomputed(order, terms),
            lambda coefficients, norms: self.recomputed(order, terms, coefficients, norms),
            self.first_moments(order),
            ROUNDING_BY_DTYPE["float32"],
            norm,
        )


@pytest.mark.first_cases(4)
@pytest.mark.parametrize("clip", [0.05, 1e9])
@pytest.mark.parametrize("count", ORDERS)
@pytest.mark.parametrize(
    "coefficients",
    [{}, {KL.name: -1.0}, {ENTROPY.name: 0.0}, {TRUNCATED.name: 2.0}, {POLICY.name: 0.0}],
    ids=["healthy", "KL -1", "entropy 0", "truncated 2", "policy 0"],
)
def test_planted_coefficients_are_found(coefficients, count, clip):
    run, order = Run(clip), ORDERS[count]
    norm = run.step(order, coefficients)
    assert (norm > 2 * clip) == (clip < 1), "the gradient is clipped where it should be"
    fit = run.fit(order, norm)
    for found in fit.coefficients:
        assert found.value == pytest.approx(coefficients.get(found.term.name, 1.0), abs=1e-3)
        assert found.is_identifiable
    assert [found.term.name for found in fit.departing_coefficients(2**-8)] == list(coefficients)
    assert fit.residual < 1e-3


def test_the_norms_are_those_of_each_term_alone():
    run, order = Run(), ORDERS[1]
    norms = run.recomputed(order, TERMS).norms
    for term in TERMS:
        run.inner.zero_grad()
        run.loss(order[0], term).backward()
        expected = math.sqrt(sum(float(p.grad.square().sum()) for p in run.twin.parameters()))
        assert norms[term.name] == pytest.approx(expected, rel=1e-5)


def test_the_updates_are_those_of_the_sum():
    """Weights, moments and metrics are the same with and without the terms apart."""
    run, order = Run(), ORDERS[2]
    made = []
    for gradients in (None, TermGradients(TERMS)):
        model = Model()
        model.load_state_dict(run.model.state_dict())
        updates = StepUpdates(model, run.before, 3, run.rows, run.old, run.reference)
        metrics = [each.metrics for each in updates.run(order, LOSS, ADAM, terms=gradients)]
        made.append((metrics, model.state_dict(), updates.adam.first_moments))
    for one, other in zip(made[0][0], made[1][0], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in zip(made[0][1:], made[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_terms_that_are_alike_or_small_are_not_identifiable():
    run, order = Run(), ORDERS[1]
    norm = run.step(order, {KL.name: -1.0})
    twice = replace(ENTROPY, name="the entropy term again")
    fit = run.fit(order, norm, (*TERMS, twice))
    known = {found.term.name: found.is_identifiable for found in fit.coefficients}
    assert known == {t.name: t is not ENTROPY and t is not twice for t in (*TERMS, twice)}
    assert [found.term.name for found in fit.departing_coefficients(2**-8)] == [KL.name]
    gradients = run.recomputed(order, TERMS)
    for values in gradients.columns[KL.name].values():
        values.mul_(1e-6)
    fit = fit_coefficients(gradients, run.first_moments(order), ROUNDING_BY_DTYPE["float32"])
    assert not fit.coefficients[2].is_identifiable


def test_a_gradient_of_something_else_names_no_term():
    run, order = Run(), ORDERS[1]
    norm = run.step(order, {})
    for parameter in run.twin.parameters():
        state = run.inner.state[parameter]
        state["exp_avg"] = torch.randn_like(state["exp_avg"])
    fit = run.fit(order, norm)
    assert fit.residual > 0.5 and not fit.departing_coefficients(2**-8)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_responses_that_are_left_out_enter_with_nothing(coefficient):
    run, order = Run(), ([0, 3],)
    absent = replace(
        TRUNCATED, expected_coefficient=0.0, left_out_rows=({1: run.rows[1], 2: run.rows[2]},)
    )
    terms = [replace(term, rows=term.rows & {0, 3}) for term in (POLICY, KL, ENTROPY)]
    run.inner.zero_grad()
    parts = [run.loss([0, 3], term) for term in terms]
    # Over two responses, as the others: the denominator of the loss is theirs.
    parts.append(coefficient * 2 * run.loss([0, 1, 2, 3], TRUNCATED))
    sum(parts).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(run.twin.parameters(), run.clip))
    run.inner.step()
    found = run.fit(order, norm, (*terms, absent)).coefficients[-1]
    assert found.is_identifiable and found.value == pytest.approx(coefficient, abs=2e-4)


def test_the_terms_of_a_step_are_those_of_its_settings():
    cut = [False, True, False, True]
    step = SimpleNamespace(
        sequences=[SimpleNamespace(response=(0, index)) for index in range(4)],
        responses={
            (0, i): SimpleNamespace(is_truncated=each, is_graded=True) for i, each in enumerate(cut)
        },
    )
    left_out = [*rows()[:3], replace(rows()[3], advantage=math.nan)]
    terms = loss_terms(step, left_out, LOSS)
    assert [(term.part, sorted(term.rows)) for term in terms] == [
        *(("policy", [0, 2]), ("policy", [1]), ("kl", [0, 1, 2]), ("entropy", [0, 1, 2])),
    ]
    without = replace(LOSS, kl_beta=0.0, entropy_coef=0.0)
    assert {term.part for term in loss_terms(step, left_out, without)} == {"policy"}


def test_responses_that_are_left_out_have_the_advantages_that_they_would_have(planted):  # noqa: F811
    """Of a group with rewards 1.1, 0 (no grade), 1.1 and 0.1, the last of them cut off."""
    marked_ungraded(planted)
    last = planted.groups[0].responses[3]
    cut = replace(last, response=replace(last.response, finish_reason="length"))
    planted.groups[0].responses[3] = cut
    planted.settings["rl"] |= {"truncated": "mask", "algorithm": "grpo"}
    step = planted.read()
    made = Recomputation(step)
    masked, ungraded = left_out_terms(step, list, made.inputs.minibatches, made.models.rows)
    for term, index, group in (
        (ungraded, 1, [1.1, 0.0, 1.1, 0.1]),
        (masked, 3, [1.1, 1.1, 0.1]),  # what has no grade is in no group's mean
    ):
        rewards = torch.tensor(group, dtype=torch.float64)
        deviation = rewards.std(unbiased=False) + step.config.rl.advantage_epsilon
        advantages = ((rewards - rewards.mean()) / deviation).tolist()
        assert term.rows == {index} and term.expected_coefficient == 0.0
        (row,) = [row for update in term.left_out_rows for row in update.values()]
        assert row.advantage == pytest.approx(advantages[1 if index == 1 else -1])
    assert "rl.truncated" in masked.remedy and "grade" in ungraded.remedy


def compared(coefficients: dict[str, float], trains_mtp_layers: bool = False):
    """What the check says of a run with some coefficients."""
    run, order = Run(clip=1e9), ORDERS[1]
    config = parse_recipe({"model": {"dtype": "float32"}})
    fit = run.fit(order, run.step(order, coefficients))
    step = SimpleNamespace(
        config=config,
        run_config=config,
        advantages=[[1.0, math.nan]],
        has_response_advantages=True,
    )
    return compare_terms(
        step,
        SimpleNamespace(term_fit=fit, inputs=SimpleNamespace(trains_mtp_layers=trains_mtp_layers)),
    )


def test_the_check_names_the_term_and_its_setting():
    assert not compared({}).differs
    assert "the KL term" in compared({}).description and "x 1.0000" in compared({}).description
    found = compared({KL.name: -1.0})
    assert found.differs and found.remedy == "rl.kl_beta"
    assert found.reason.startswith("the KL term entered with -1.00 times its gradient (")
    found = compared({term.name: 2.0 for term in TERMS})
    assert found.differs and found.remedy == GRADIENT_REMEDY
    assert "MTP layers' loss, not checked" in compared({}, trains_mtp_layers=True).description


def test_what_is_not_known_is_said():
    config = parse_recipe({})

    class Missing:
        @property
        def term_fit(self):
            raise CannotRecompute("no checkpoint of step 3 has Adam's moments")

    found = compare_terms(SimpleNamespace(run_config=config), Missing())
    assert (found.status, found.reason) == (
        "not checked",
        "no checkpoint of step 3 has Adam's moments",
    )


def test_of_moments_in_16_bits_no_gradient_is_taken_back():
    step = step_of({"kl_beta": 0.0}, optimizer={"moments": "bfloat16"})
    made = Recomputation(SimpleNamespace(**vars(step), step=3, checkpoint_after=None))
    made.inputs.check_updates = lambda: None
    with pytest.raises(CannotRecompute, match="no checkpoint of step 3"):
        _ = made.term_fit
    made = Recomputation(step)
    made.inputs.check_updates = lambda: None
    made.checkpoint_after.moments = {}, {}
    with pytest.raises(CannotRecompute, match=r"optimizer.moments: bfloat16"):
        _ = made.term_fit
