"""RMSNorm's values and hand-made gradients, against autograd's of the formula in fp64."""

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.models.layers import RMSNorm


def formula(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


# bf16: 8 bits, rounded at the normalized value, at the product and at the gradient.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(7, 1, 24), (1, 1, 1), (3, 5)])
def test_values_and_gradients_are_those_of_the_formula(dtype, tolerance, shape):
    torch.manual_seed(0)
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    norm = RMSNorm(config, shape[-1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(shape[-1]))
    x = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    got = norm(x)
    got.backward(upstream)

    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    expected = formula(wide_x, wide_weight, 1e-3)
    expected.backward(upstream.double())
    pairs = ((got, expected), (x.grad, wide_x.grad), (norm.weight.grad, wide_weight.grad))
    for name, (mine, right) in zip(("value", "x", "weight"), pairs, strict=True):
        assert mine.dtype == dtype
        gap = (mine.double() - right).abs().max() / right.abs().max().clamp(min=1)
        assert gap <= tolerance, f"{name}: {gap}"
