"""Transformer Engine's FP8 linear against our emulation of it, on one GPU that has the recipe."""

import pytest
import torch

from megatron_r1.config import FP8Config
from megatron_r1.models.fp8 import find_fp8_recipe
from megatron_r1.models.fp8_checks import check_fp8_device
from megatron_r1.models.fp8_emulation import fp8_linear

ENGINE_RECIPES = {
    "blockwise": "Float8BlockScaling",
    "tensorwise": "Float8CurrentScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@pytest.mark.parametrize("shape", [(256, 512, 384), (384, 7168, 576), (128, 1536, 2048)])
@pytest.mark.parametrize("name", ENGINE_RECIPES)
def test_the_emulation_is_what_transformer_engine_computes(name, shape):
    te = pytest.importorskip("transformer_engine.pytorch", reason="make setup-cuda")
    from transformer_engine.common import recipe as engine_recipes

    fp8 = FP8Config(recipe=name)
    cuda = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    try:
        check_fp8_device(fp8, torch.cuda.get_device_capability(), cuda)
    except ValueError as error:
        pytest.skip(str(error))
    tokens, inputs, outputs = shape
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*size, spread):
        x = torch.randn(*size, generator=g, device="cuda")
        return (x * torch.logspace(-2, 2, size[-1], device="cuda") * spread).bfloat16()

    x = draw(tokens, inputs, spread=1.0).requires_grad_()
    dy = draw(tokens, outputs, spread=1e-4)
    layer = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
    engine_recipe = getattr(engine_recipes, ENGINE_RECIPES[name])()
    with te.fp8_autocast(enabled=True, fp8_recipe=engine_recipe):
        y = layer(x)
    got = (y, *torch.autograd.grad(y, (x, layer.weight), dy))
    weight = layer.weight.detach().requires_grad_()
    want = fp8_linear(x, weight, find_fp8_recipe(fp8))
    want = (want, *torch.autograd.grad(want, (x, weight), dy))
    exact = (x @ weight.T, dy @ weight, dy.T @ x)
    for what, ours, theirs, plain in zip(("y", "dx", "dw"), want, got, exact, strict=True):
        ours, theirs, plain = (t.detach().float() for t in (ours, theirs, plain))
        apart = (ours - theirs).norm() / theirs.norm()
        quantized = (plain - theirs).norm() / theirs.norm()
        # Both round to bf16 at the end (2^-9 on average); FP8 is ten times as far from bf16.
        assert quantized > 0.01, (name, shape, what)
        # By default Transformer Engine's tensorwise recipe lets Hopper's tensor cores add up the
        # forward product (some 14 bits, DeepSeek-V3 section 3.3.2): 0.0186 on an H200 for 7,168
        # terms.
        adds_roughly = name == "tensorwise" and what == "y" and inputs > 4096
        most = 0.025 if adds_roughly else 4e-3
        assert apart < most, (name, shape, what, apart.item())
