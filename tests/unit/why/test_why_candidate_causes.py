"""Candidate causes in a step's updates, against formulas by hand and against torch."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import r1_kernels
import torch
from test_why import planted  # noqa: F401
from test_why_updates import ADAM, RULES, Model, rows

from megatron_r1.config import parse_recipe
from megatron_r1.why.checks.cause_search import find_update_cause
from megatron_r1.why.checks.checkpoints import _missing_updates
from megatron_r1.why.policy import checkpoint_model
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.update.adam import Adam
from megatron_r1.why.update.advantage_causes import advantage_causes
from megatron_r1.why.update.candidate_cause import CandidateCause
from megatron_r1.why.update.loss_causes import kl_causes, loss_causes
from megatron_r1.why.update.loss_formulas import Totals, row_loss
from megatron_r1.why.update.optimizer_causes import _update_causes as update_causes
from megatron_r1.why.update.run_differences import RunDifferences
from megatron_r1.why.update.step_updates import StepUpdates

FREE = replace(RULES, clip_low=math.inf, clip_high=math.inf)


def without(row, place: str):
    """A row that is sampled up to its last token, or from its second on."""
    is_sampled, used = row.is_sampled.clone(), slice(1, None) if place == "first" else slice(-1)
    is_sampled[is_sampled.nonzero()[0 if place == "first" else -1]] = False
    return replace(
        row,
        is_sampled=is_sampled,
        logprobs=row.logprobs[used],
        num_sampled=row.num_sampled - 1,
    )


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_token_that_is_left_out_is_as_one_that_was_not_sampled(place, average):
    torch.manual_seed(1)
    model, given = Model(), rows()
    shorter = [without(row, place) for row in given]
    loss = replace(RULES, average=average, entropy_coef=0.1, importance_cap=1.2)
    made = []
    for some, rules in ((given, replace(loss, leaves_out=place)), (shorter, loss)):
        old = sampled_logprobs(model, some, [loss.temperature])[0]
        reference = [values - 0.1 for values in old]
        updates = StepUpdates(model, None, 0, some, old, reference)
        made += updates.run([range(4)], rules, replace(ADAM, learning_rates=(0.0,)))
    assert made[0].metrics == pytest.approx(made[1].metrics, rel=1e-6)


def loss_and_slope(loss, gap: float):
    """The loss of one token of advantage 0.7, and its derivative.

    Its log-probability is `gap` above the old policy's, 0.2 above the reference's, and its old one
    is 0.3 above the engine's."""
    row = replace(rows()[0], logprobs=torch.tensor([-1.3]), num_sampled=1, advantage=0.7)
    old = torch.tensor([-1.0], dtype=torch.float64)
    own = (old + gap).requires_grad_()
    reference = (own - 0.2).detach()
    totals = Totals(denominator=1.0)
    term = row_loss(row, own, torch.zeros(1).double(), old, reference, loss, totals)
    term.backward()
    return float(term.detach()), float(own.grad)


@pytest.mark.parametrize(
    ("new", "old", "ref", "engine"),
    [(-1.0, -27.0, -2.0, -27.0), (-30.0, -30.0, -1.0, -30.0), (-1.0, -1.0, -1.5, -26.0)],
    ids=["ratio", "KL", "importance"],
)
def test_exponents_are_capped_where_the_kernels_cap_them(new, old, ref, engine):
    settings = {"clip_low": 1.0, "clip_high": 1e12, "kl_beta": 0.5, "importance_cap": math.inf}
    loss = replace(RULES, kl_estimator="k3", average="token", entropy_coef=0.0, **settings)
    values = [torch.tensor([value], dtype=torch.float64) for value in (new, old, ref, engine)]
    row = replace(rows()[0], logprobs=values[3], num_sampled=1, advantage=0.7)
    gradients = []
    for compute in (
        lambda own: row_loss(
            row, own, torch.zeros(1).double(), *values[1:3], loss, Totals(denominator=1.0)
        ),
        lambda own: (
            r1_kernels.policy_loss(
                own,
                *values[1:3],
                torch.tensor([0.7], dtype=torch.float64),
                torch.ones(1),
                rollout_logprobs=values[3],
                **settings,
            ).loss
        ),
    ):
        own = values[0].clone().requires_grad_()
        term = compute(own)
        term.backward()
        gradients.append((float(term.detach()), float(own.grad)))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-9)


def test_an_inverted_ratio_is_that_of_old_over_policy():
    loss = replace(FREE, kl_beta=0.0, inverts_ratio=True)
    value = 0.7 * math.exp(-0.1)
    assert loss_and_slope(loss, 0.1) == pytest.approx((-value, value), rel=1e-6)
    kept = replace(loss, keeps_slope=True)
    assert loss_and_slope(kept, 0.1) == pytest.approx((-value, -value), rel=1e-6)


def test_kl_with_exchanged_arguments_is_that_of_the_reference():
    loss = replace(FREE, kl_beta=1.0, reverses_kl=True, is_on_policy=True)
    policy, policy_slope = loss_and_slope(replace(loss, kl_beta=0.0), 0.0)
    kl, slope = math.exp(0.2) - 1 - 0.2, math.exp(0.2) - 1
    expected = policy + kl, policy_slope + slope
    assert loss_and_slope(loss, 0.0) == pytest.approx(expected, rel=1e-5)
    expected = policy + kl, policy_slope - slope
    assert loss_and_slope(replace(loss, keeps_slope=True), 0.0) == pytest.approx(expected, rel=1e-5)


def test_importance_weights_and_the_old_policy_may_be_of_the_engine():
    loss = replace(FREE, kl_beta=0.0, importance_cap=5.0)
    ratio, importance = math.exp(0.1), math.exp(0.3)
    value, _ = loss_and_slope(loss, 0.1)
    assert value == pytest.approx(-0.7 * ratio * importance, rel=1e-6)
    value, _ = loss_and_slope(replace(loss, inverts_importance=True), 0.1)
    assert value == pytest.approx(-0.7 * ratio / importance, rel=1e-6)
    value, _ = loss_and_slope(replace(loss, uses_engine_as_old=True), 0.1)
    assert value == pytest.approx(-0.7 * math.exp(0.4), rel=1e-6)


def test_gradients_that_add_up_are_torchs_without_zero_grad():
    parameters = {"weight": torch.randn(3, 2)}
    twin = parameters["weight"].clone().requires_grad_()
    inner = torch.optim.AdamW([twin], 1.0, (ADAM.beta1, ADAM.beta2), 1e-8, ADAM.weight_decay)
    adam, rules = Adam(parameters, None, 0), replace(ADAM, accumulates=True, clip_grad=0.5)
    for index in range(2):
        gradient = torch.randn(3, 2)
        (twin * gradient).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_([twin], rules.clip_grad)
        inner.param_groups[0]["lr"] = rules.learning_rates[index]
        inner.step()
        assert adam.step({"weight": gradient}, rules, index) == pytest.approx(float(norm))
    torch.testing.assert_close(parameters["weight"], twin.detach())


def test_an_update_that_is_left_out_changes_neither_weights_nor_counter():
    gradient = {"weight": torch.ones(2)}
    skipped, single = (Adam({"weight": torch.zeros(2)}, None, 0) for _ in range(2))
    rules = replace(ADAM, skipped_updates=(0,))
    skipped.step(gradient, rules, 0)
    assert skipped.count == 0 and not skipped.first_moments["weight"].any()
    skipped.step(gradient, rules, 1)
    single.step(gradient, ADAM, 1)
    torch.testing.assert_close(skipped.first_moments, single.first_moments)
    assert skipped.count == 1


@pytest.mark.parametrize(("count", "factor"), [(math.inf, 0.1 / math.sqrt(0.05)), (1, 1.0)])
def test_other_bias_corrections_by_hand(count, factor):
    weight = torch.zeros(1)
    adam = Adam({"bias": weight}, (({"bias": torch.zeros(1)},) * 2), 9)
    adam.step({"bias": torch.ones(1)}, replace(ADAM, bias_count=count, clip_grad=2.0), 0)
    assert float(weight) == pytest.approx(-1e-3 * factor, rel=1e-5)


def test_each_kind_of_loss_and_update_is_tried():
    rl = {"kl_beta": 0.1, "importance_cap": 2.0, "minibatches": 4}
    config = parse_recipe({"rl": rl})
    step = SimpleNamespace(config=config, run_config=config, folder=None, step=1)
    fields = {
        pair
        for each in (*loss_causes(step), *_kl_of(step), *update_causes(step))
        for pair in (*each.loss, *each.adam)
    }
    assert fields >= {
        ("leaves_out", "last"),
        ("leaves_out", "first"),
        ("uses_engine_as_old", True),
        ("inverts_ratio", True),
        ("inverts_importance", True),
        ("reverses_kl", True),
        ("accumulates", True),
        ("bias_count", math.inf),
        *(("skipped_updates", (index,)) for index in range(4)),
    }


def _kl_of(step):
    """All but the references, which need a run's folder."""
    made = iter(kl_causes(step))
    return [next(made) for _ in range(6)]


def test_other_advantages_are_tried(planted):  # noqa: F811
    planted.settings["rl"] |= {"overlong_buffer": 0.9}
    step = planted.read()
    step.metrics_row["grad_norm"] = 3.1
    found = {each.name: each for each in advantage_causes(step, RunDifferences(norm=1.0))}
    advantages = [a for group in step.advantages for a in group]

    def of(name: str):
        return [a for group in found[name].advantages for a in group]

    assert of("advantages clipped at 0") == [max(0.0, a) for a in advantages]
    assert of("advantages times 3.1") == [3.1 * a for a in advantages]
    # Of the same rewards: (d + 1e-6) / (d + 1) times, d the deviation.
    factors = {
        round(a / b, 6) for a, b in zip(of("rl.advantage_epsilon 1"), advantages, strict=True)
    }
    assert factors and all(0.2 < factor < 0.5 for factor in factors)
    assert "rl.advantage_epsilon 1e-06" not in found  # it is the setting
    penalized = of(
        "a penalty of long responses that is added to their rewards, with the other sign,"
    )
    assert penalized != advantages


def test_a_value_of_a_setting_is_tried_before_a_factor_that_does_the_same(planted):  # noqa: F811
    """Where every group's deviation is 1/2, dividing by it doubles, as a factor of 2 does."""
    step = planted.read()
    metrics = {"loss": 0.5, "kl": 0.0, "entropy": 1.0}
    step.metrics_row.update(metrics)
    names = ["advantages divided by the deviation of: group", "advantages times 2"]
    distances = dict(zip(names, (1 + 3e-5, 1 + 1e-5), strict=True)) | {"far": 2.0}
    updates = SimpleNamespace(metrics=metrics, update_distance=None, moment_distance=None)
    recomputation = SimpleNamespace(
        estimates=SimpleNamespace(distance=lambda tried, _: distances[tried.name]),
        run=lambda tried, _: updates,
    )
    candidates = [CandidateCause(name) for name in ("far", *names)]
    found, _ = find_update_cause(step, recomputation, candidates)
    assert found.name == names[0]
    distances[names[0]] = 1.01  # further off by more than rounding
    found, _ = find_update_cause(step, recomputation, candidates)
    assert found.name == names[1]


@pytest.mark.parametrize(
    ("counters", "words"),
    [((2, 3), "made 1 of the 2 updates"), ((1, 1), "stands still at 1"), ((0, 2), None)],
)
def test_counters_say_which_updates_are_missing(tmp_path, monkeypatch, counters, words):
    paths = [tmp_path / name for name in ("before", "after")]
    for path in paths:
        path.mkdir()
        (path / ".metadata").touch()
    numbers = dict(zip(paths, counters, strict=True))
    monkeypatch.setattr(checkpoint_model, "read_state", numbers.__getitem__)
    step = SimpleNamespace(
        checkpoint_before=paths[0],
        checkpoint_after=paths[1],
        step=3,
        updates_after=lambda step: 2 * step,
    )
    found = _missing_updates(step)
    assert found is None if words is None else words in found[0]
