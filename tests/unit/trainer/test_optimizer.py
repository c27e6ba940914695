"""Adam with bf16 moments against Adam written out."""

from types import SimpleNamespace

import torch
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.models import platform
from megatron_r1.trainer.optimizer import moment_fields, offload_fields, round_moments

BF16 = parse_recipe({"optimizer": {"moments": "bfloat16"}})


def adam(weight, gradients, keep):
    """fp64 Adam, beta 0.9 and 0.95; `keep`: what is left of a moment after a step."""
    weight, m, v = weight.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        weight = weight - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        m, v = keep(m), keep(v)
    return weight


def test_moments_are_rounded_to_bf16_after_every_step():
    g = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(50, generator=g), torch.randn(20, 50, generator=g)
    weight = torch.nn.Parameter(start.clone())
    inner = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    round_moments(SimpleNamespace(optimizer=inner), BF16)
    for gradient in gradients:
        weight.grad = gradient.clone()
        inner.step()
    rounded = adam(start, gradients, lambda moment: moment.bfloat16().double())
    exact = adam(start, gradients, lambda moment: moment)
    gap = (weight.detach() - rounded).abs().max()
    # A moment in the middle of two bf16 numbers may fall to the other side in fp32.
    assert gap < 0.2 * (exact - rounded).abs().max()
    for name in ("exp_avg", "exp_avg_sq"):
        kept = inner.state[weight][name]
        assert kept.dtype == torch.float32 and torch.equal(kept, kept.bfloat16().float())


def test_moment_fields_on_a_gpu(monkeypatch):
    assert moment_fields(BF16) == {}
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    fields = moment_fields(BF16)
    assert fields["exp_avg_dtype"] == fields["exp_avg_sq_dtype"] == torch.bfloat16
    # Else the master weights of a checkpoint do not load.
    assert fields["store_param_remainders"] is False
    both = {"optimizer": {"moments": "bfloat16"}, "parallel": {"optimizer_offload": 0.5}}
    with refused("optimizer.moments", Cause.CONFLICT, "parallel.optimizer_offload"):
        moment_fields(parse_recipe(both))
    assert moment_fields(parse_recipe({})) == {}


def test_an_offload_in_fp32_is_refused_on_a_gpu(monkeypatch):
    in_fp32 = parse_recipe({"model": {"dtype": "float32"}, "parallel": {"optimizer_offload": 0.5}})
    assert offload_fields(in_fp32) == {}
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    with refused("parallel.optimizer_offload", Cause.CONFLICT, "model.dtype=float32"):
        offload_fields(in_fp32)
    in_bf16 = parse_recipe({"parallel": {"optimizer_offload": 0.5}})
    assert offload_fields(in_bf16)["optimizer_offload_fraction"] == 0.5
    assert offload_fields(parse_recipe({})) == {}
