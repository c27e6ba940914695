"""Updates that share the first forward pass are those that make it anew, and none is finished that
cannot be what was recorded."""

from dataclasses import replace

import pytest
import torch
from test_why_loss_terms import LOSS, ORDERS, TERMS, Run
from test_why_updates import ADAM, Model

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import token_logprobs
from megatron_r1.why.policy.step_models import threads_for
from megatron_r1.why.update import first_update as first_updates
from megatron_r1.why.update.first_update import FirstUpdate, first_update
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.term_gradients import TermGradients

ORDER = ORDERS[2]
SETTINGS = LOSS, ADAM, True
OTHERS = {
    "the same": SETTINGS,
    "another beta2": (LOSS, replace(ADAM, beta2=0.5), True),
    "moments lost": (LOSS, replace(ADAM, moment_reset="update"), True),
    "KL with the wrong sign": (replace(LOSS, kl_beta=-LOSS.kl_beta), ADAM, False),
    "another temperature": (replace(LOSS, temperature=1.0), ADAM, False),
}


def updates_of(run: Run, first: FirstUpdate | None) -> StepUpdates:
    model = Model()
    model.load_state_dict(run.model.state_dict())
    return StepUpdates(model, run.before, 3, run.rows, run.old, run.reference, 0.0, first)


def result(updates: StepUpdates, loss, adam, is_known, terms=None):
    made = updates.run(ORDER, loss, adam, terms=terms, is_known=is_known)
    return [each.metrics for each in made], updates.model.state_dict(), updates.adam.second_moments


def first_of(run: Run) -> FirstUpdate:
    return FirstUpdate(run.model, {index: run.rows[index] for index in ORDER[0]})


@pytest.mark.parametrize("has_terms", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_shared_first_update_changes_nothing(name, has_terms):
    run, (loss, adam, is_known) = Run(), OTHERS[name]
    first = first_of(run)
    result(updates_of(run, first), *SETTINGS, TermGradients(TERMS) if has_terms else None)
    shared = result(updates_of(run, first), loss, adam, is_known)
    alone = result(updates_of(run, None), loss, adam, is_known)
    for one, other in zip(shared[0], alone[0], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for one, other in zip(shared[1:], alone[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_terms_of_a_shared_first_update_are_added_with_other_coefficients():
    run = Run()
    first = first_of(run)
    result(updates_of(run, first), *SETTINGS, TermGradients(TERMS))
    both = []
    for shared in (first, None):
        terms = TermGradients(TERMS, {TERMS[2].name: -1.0})
        result(updates_of(run, shared), *SETTINGS, terms)
        both.append(terms)
    torch.testing.assert_close(both[0].products, both[1].products, rtol=1e-4, atol=1e-9)
    for name, column in both[0].columns.items():
        torch.testing.assert_close(column, both[1].columns[name], rtol=1e-4, atol=1e-8)


def test_the_first_pass_is_made_once(monkeypatch):
    run, num_passes = Run(), []
    compute = token_logprobs.token_logits
    monkeypatch.setattr(
        first_updates, "token_logits", lambda *given: num_passes.append(1) or compute(*given)
    )
    first = first_of(run)
    for _ in range(3):
        result(updates_of(run, first), *SETTINGS)
    result(updates_of(run, first), replace(LOSS, kl_beta=0.0), ADAM, False)
    assert len(num_passes) == 1 + 4, "one of the first update, one of each second"


def test_other_tokens_are_not_those_of_the_first_update():
    run = Run()
    first, rows = first_of(run), {index: run.rows[index] for index in ORDER[0]}
    assert first.has_inputs({index: replace(row, advantage=3.0) for index, row in rows.items()})
    assert not first.has_inputs(dict(reversed(rows.items())))
    changed = {index: replace(row, is_sampled=~row.is_sampled) for index, row in rows.items()}
    assert not first.has_inputs(changed)


def test_a_large_graph_is_not_kept():
    run = Run()
    assert first_update(run.model, run.rows, ORDER[0], 100) is not None
    assert first_update(run.model, run.rows, ORDER[0], first_updates.MAX_PARAMETERS + 1) is None


@pytest.mark.parametrize("is_known", [False, True])
def test_updates_that_are_not_possible_have_no_last_step(is_known):
    run, asked = Run(), []

    def is_possible(measured):
        asked.append([each.metrics["loss"] for each in measured])
        return False

    first = first_of(run)
    whole, *_ = result(updates_of(run, first), *SETTINGS)
    updates = updates_of(run, first)
    made = updates.run(ORDER, LOSS, ADAM, is_known=is_known, is_possible=is_possible)
    assert len(made) == len(updates.traces) == len(ORDER) - 1
    assert asked == [pytest.approx([each["loss"] for each in whole])]
    assert updates.adam.count == 3 + len(ORDER) - 1


@pytest.mark.parametrize(("flops", "expected"), [(1.0, 1), (2.0**40, 2)])
def test_a_small_step_has_one_thread(flops, expected):
    class Small:
        pass_flops = flops

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(Small()):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_threads_stay_where_the_size_is_not_known():
    class Unknown:
        @property
        def pass_flops(self):
            raise CannotRecompute("no such model")

    before = torch.get_num_threads()
    with threads_for(Unknown()):
        assert torch.get_num_threads() == before
