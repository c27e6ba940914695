"""`why` on experts that are replayed: whose choice departs, the engine's, the log's or the
trainer's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_expert_replay import random_model, random_row, with_experts

from megatron_r1.why.checks.routing import compare_routing
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.routed_experts import seen_experts
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.token_logprobs import token_logits
from megatron_r1.why.policy.token_rows import rows_with_own_experts


def step_with(agreement: float | None, version: int = 2, routing_replay: bool = True):
    line = {} if agreement is None else {"routing/agreement": agreement}
    float32 = SimpleNamespace(dtype="float32")
    return SimpleNamespace(
        step=3,
        metrics_row=line,
        config=SimpleNamespace(rl=SimpleNamespace(routing_replay=routing_replay)),
        run_config=SimpleNamespace(rollout=float32, model=float32),
        sequences=[SimpleNamespace(versions=np.full(4, version))],
    )


def recomputed_with(agreement_by_shift: dict[int, float] | None):
    def routing_agreement(shift: int = 0) -> float:
        if agreement_by_shift is None:
            raise CannotRecompute("no checkpoint")
        return agreement_by_shift[shift]

    return SimpleNamespace(policies=SimpleNamespace(routing_agreement=routing_agreement))


@pytest.mark.parametrize(
    ("agreement_by_shift", "words"),
    [
        ({0: 1.0, 1: 0.4, -1: 0.4}, "the trainer replays"),
        ({0: 0.4, 1: 0.3, -1: 1.0}, "those of the token after are the routers'"),
        ({0: 0.4, 1: 1.0, -1: 0.3}, "those of the token before are the routers'"),
        ({0: 0.4, 1: 0.3, -1: 0.3}, "40.0% of the experts otherwise"),
        (None, "40.0% of the experts otherwise"),
    ],
)
def test_other_experts_are_explained(agreement_by_shift, words):
    (comparison,) = compare_routing(step_with(0.6), recomputed_with(agreement_by_shift))
    assert comparison.differs and comparison.distance == pytest.approx(0.4)
    assert words in comparison.reason
    is_explained = agreement_by_shift is not None and 1.0 in agreement_by_shift.values()
    assert ("e_score_correction_bias" in comparison.remedy) is not is_explained


def test_equal_experts_are_not_recomputed():
    (comparison,) = compare_routing(step_with(0.9995), None)
    assert comparison.status == "equal"


@pytest.mark.parametrize("step", [step_with(None), step_with(0.5, version=1)])
def test_what_is_not_logged_or_of_earlier_weights_is_not_checked(step):
    (comparison,) = compare_routing(step, None)
    assert comparison.status == "not checked"


def test_without_replay_nothing_is_compared():
    assert compare_routing(step_with(0.5, routing_replay=False), None) == []


def test_agreement_is_the_share_of_logged_experts_that_the_model_chooses():
    model = random_model("Qwen3Moe")
    row = random_row(12)
    with torch.no_grad(), seen_experts(model) as chosen:
        token_logits(model, rows_with_own_experts([row]))
    experts = torch.stack(list(chosen.values()), dim=1)  # (tokens, layers, experts per token)

    def agreement(recorded: torch.Tensor, shift: int = 0) -> float:
        rows = [with_experts(row, recorded)]
        models = SimpleNamespace(step=None, rows=rows, policy=model, is_streamed=False)
        logprobs = StepLogprobs(models)
        logprobs.computed_sequences = [0]
        return logprobs.routing_agreement(shift)

    assert agreement(experts.flip(-1)) == 1.0  # the order of a token's experts has no meaning
    other = experts.clone()
    predicting = np.flatnonzero(row.is_sampled.numpy()) - 1
    unused = next(e for e in range(8) if e not in experts[predicting[0], 0])
    other[predicting[0], 0, 0] = unused
    assert agreement(other) == pytest.approx(1 - 1 / (len(predicting) * 2 * 3))
    assert agreement(experts.roll(1, 0)) < 1.0
    assert agreement(experts.roll(1, 0), shift=-1) == 1.0
