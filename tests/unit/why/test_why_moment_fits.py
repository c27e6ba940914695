"""The norm to which a run clips, fitted to first moments that PyTorch's AdamW has made."""

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.why.update.adam import Adam, AdamRules
from megatron_r1.why.update.moment_fits import fit_clip

RATE, SETTINGS = 0.3, OptimizerConfig(clip_grad=0.5)
BEGIN = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
SCALES = torch.linspace(0.2, 2.0, 12).reshape(3, 4)


def loss_of(weight, update):
    """A loss whose gradient depends on the weights: the second update's on the first."""
    return (SCALES.roll(update) * (weight - update).square()).sum()


def moments_of_a_run(clips):
    weight = torch.nn.Parameter(BEGIN.clone())
    optimizer = torch.optim.AdamW(
        [weight], RATE, (SETTINGS.beta1, SETTINGS.beta2), SETTINGS.epsilon, weight_decay=0.0
    )
    for update, clip in enumerate(clips):
        optimizer.zero_grad()
        loss_of(weight, update).backward()
        torch.nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
    return {"weight": optimizer.state[weight]["exp_avg"]}


def make_updates(norms):
    parameters = {"weight": BEGIN.clone()}
    adam = Adam(parameters, None, 0)
    betas = (SETTINGS.beta1, SETTINGS.beta2, SETTINGS.epsilon)
    rules = AdamRules((RATE,) * len(norms), *betas, 0.0, SETTINGS.clip_grad, norms=norms)
    traces = []
    for update in range(len(norms)):
        weight = parameters["weight"].clone().requires_grad_()
        loss_of(weight, update).backward()
        traces.append(SimpleNamespace(gradients={"weight": weight.grad}))
        adam.step(traces[-1].gradients, rules, update)
    return traces


def fitted(clips):
    return fit_clip(make_updates, (1.0,) * len(clips), {}, moments_of_a_run(clips), SETTINGS)


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("num_updates", [1, 2, 3])
def test_the_norm_of_all_updates_is_found(clip, num_updates):
    assert fitted([clip] * num_updates) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("clips", [[0.2, 0.3], [0.2, 1e9]])
def test_updates_that_were_clipped_to_different_norms_have_none(clips):
    assert fitted(clips) is None
