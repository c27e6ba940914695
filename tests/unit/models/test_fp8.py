"""FP8 numerics against fp64 and a quantizer of our own.

The oracle knows a number format as the list of all its values, read off the 256 codes, and a tile
as a loop: nothing of `models.fp8` is used to make it."""

import math

import pytest
import torch
from r1_kernels import dequantize_blockwise, quantize_blockwise

from megatron_r1.config import FP8Config
from megatron_r1.models.fp8 import E4M3, E5M2, find_fp8_recipe
from megatron_r1.models.fp8_emulation import fp8_linear, round_to_fp8

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# Of the settings, what each operand of fprop, dgrad and wgrad is cut into: written down again from
# DeepSeek-V3's section 3.3.2 and the Microscaling specification. None: one scale for all.
TILES = {
    "blockwise": {"x": (1, 128), "w": (128, 128), "dy": (1, 128)},
    "tensorwise": {"x": None, "w": None, "dy": None},
    "mxfp8": {"x": (1, 32), "w": (1, 32), "dy": (1, 32)},
}


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x fp64 -> the nearest value of `dtype`, ties to the even code; beyond the largest: it."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).double()
    positive = values.isfinite() & (codes < 128)
    codes, values = codes[positive], values[positive]
    above = torch.searchsorted(values, x.abs().contiguous()).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - x.abs(), x.abs() - values[below]
    even = codes[above] % 2 == 0
    take_above = (up < down) | ((up == down) & even)
    return torch.where(take_above, values[above], values[below]) * x.sign()


def quantized(x, tile, dtype, power_of_two) -> torch.Tensor:
    """fp64 of x's FP8 copy, one tile at a time."""
    x, out = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    rows, columns = tile or x.shape
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns]
            amax = part.abs().max().item()
            scale = LARGEST[dtype] / amax if amax else 1.0
            if power_of_two:
                scale = 2.0 ** math.floor(math.log2(scale))
            out[i : i + rows, j : j + columns] = nearest(part * scale, dtype) / scale
    return out


def wide(shape, seed=0) -> torch.Tensor:
    """Values whose magnitudes span 12 powers of ten, some of them exactly 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 10.0 ** (torch.rand(shape, generator=g) * 12 - 8)
    return x.masked_fill(torch.rand(shape, generator=g) < 0.1, 0.0)


@pytest.mark.first_cases(12)
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (3, 32), (257, 31)])
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), (1, 32), (32, 1), None])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_is_the_nearest_value_at_the_tile_s_scale(shape, tile, dtype):
    x = wide(shape)
    got = round_to_fp8(x, tile or (0, 0), dtype, power_of_two=True)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), quantized(x, tile, dtype, True))
    # The scale itself is rounded here, so a value may fall on the other side of the middle.
    got = round_to_fp8(x, tile or (0, 0), dtype, power_of_two=False).double()
    want = quantized(x, tile, dtype, False)
    same = (got - want).abs() <= 1e-6 * want.abs()
    assert same.float().mean() > 0.995
    spacing = 2.0 ** -(3 if dtype == E4M3 else 2)
    assert ((got - want).abs()[~same] <= 1.01 * spacing * x.double().abs()[~same]).all()


def test_rounding_error_is_bounded_by_half_a_spacing():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for power_of_two, lost in ((True, 2.0), (False, 1.0)):
        gap = (round_to_fp8(x, (1, 128), E4M3, power_of_two) - x).abs()
        # 3 bits of mantissa: 2^-4 of the value; below 2^-6 of the scaled range, half of 2^-9.
        amax = x.view(64, 2, 128).abs().amax(-1).repeat_interleave(128, -1)
        assert (gap <= torch.maximum(x.abs() * 2**-4, lost * amax / 448 * 2**-10) * 1.0001).all()
        assert gap.norm() / x.norm() > 0.01, "nothing was rounded"


def test_zero_tiny_and_empty_tiles():
    x = torch.zeros(2, 256)
    x[0, 128:] = 1e-30
    x[1, :128] = 1e-41  # subnormal in fp32
    x[1, 128:] = -3e-39
    got = round_to_fp8(x, (1, 128), E4M3, True)
    assert torch.equal(got[0, :128], torch.zeros(128))
    assert (got / x)[0, 128:].sub(1).abs().max() <= 2**-4
    assert got.isfinite().all()
    assert round_to_fp8(torch.zeros(0, 128), (1, 128), E4M3, True).shape == (0, 128)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_value_that_is_not_finite_spoils_its_tile_and_no_other(bad, dtype):
    x = wide((4, 256))
    x[2, 130] = bad
    got = round_to_fp8(x, (1, 128), dtype, True)
    assert got[2, 128:].isnan().all()
    got[2, 128:] = 0
    assert got.isfinite().all()


def test_float32_scales_are_those_of_an_fp8_checkpoint():
    x = wide((200, 300)) + 1.0
    q, scale_inv = quantize_blockwise(x, block=(128, 128))
    exported = dequantize_blockwise(q, scale_inv, block=(128, 128), dtype=torch.float32)
    computed = round_to_fp8(x, (128, 128), E4M3, power_of_two=False)
    # 448 / amax and 1 / (amax / 448) may differ in the last bit, and then a tie falls differently.
    assert ((computed - exported).abs() <= 1e-6 * exported.abs()).float().mean() > 0.999


@pytest.mark.more
@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("blockwise", "power_of_two"),
        ("blockwise", "float32"),
        ("tensorwise", "power_of_two"),
        ("tensorwise", "float32"),
        ("mxfp8", "power_of_two"),
    ],
)
def test_a_linear_s_output_and_gradients_are_products_of_quantized_operands(name, scales):
    fp8 = FP8Config(recipe=name, scales=scales)
    g = torch.Generator().manual_seed(2)
    # 3 x 70 tokens and 300 -> 272 features: every tile has a tail.
    x = torch.randn(3, 70, 300, generator=g)
    x *= torch.logspace(-2, 2, 70)[:, None]  # so that tiles of tokens and of features differ
    w = torch.randn(272, 300, generator=g) * 0.05 * torch.logspace(-1, 1, 272)[:, None]
    dy = torch.randn(3, 70, 272, generator=g) * torch.logspace(-6, -3, 272)
    x.requires_grad_()
    w.requires_grad_()
    y = fp8_linear(x, w, find_fp8_recipe(fp8))
    dx, dw = torch.autograd.grad(y, (x, w), dy)

    gradient = E5M2 if name == "tensorwise" else E4M3
    turned = {k: tile and tile[::-1] for k, tile in TILES[name].items()}
    tokens, upstream = x.detach().flatten(0, 1), dy.flatten(0, 1)

    def operand(tensor, tile, dtype=E4M3):
        return quantized(tensor, tile, dtype, scales == "power_of_two")

    weight = w.detach()
    want = {
        "y": operand(tokens, TILES[name]["x"]) @ operand(weight, TILES[name]["w"]).T,
        "dx": operand(upstream, TILES[name]["dy"], gradient) @ operand(weight, turned["w"]),
        "dw": operand(upstream, turned["dy"], gradient).T @ operand(tokens, turned["x"]),
    }
    exact = {"y": tokens.double() @ weight.double().T}
    exact["dx"] = upstream.double() @ weight.double()
    exact["dw"] = upstream.double().T @ tokens.double()
    # fp32 sums of 300 terms; with fp32 scales a tie now and then falls to the other side.
    tolerance = 1e-6 if scales == "power_of_two" else 2e-3
    for key, got in (("y", y), ("dx", dx), ("dw", dw)):
        got = got.detach().reshape(want[key].shape).double()
        assert (got - want[key]).norm() / want[key].norm() < tolerance, key
        error = ((got - exact[key]).norm() / exact[key].norm()).item()
        # Two operands of relative error up to 2^-4 (e5m2: 2^-3), about 0.6 of it on average.
        assert 0.005 < error < (0.09 if gradient == E5M2 and key != "y" else 0.06), (key, error)


def test_a_linear_takes_no_tokens_bf16_and_frozen_weights():
    recipe = find_fp8_recipe(FP8Config(recipe="blockwise"))
    w = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(0, 32, dtype=torch.bfloat16, requires_grad=True)
    y = fp8_linear(x, w, recipe)
    y.sum().backward()
    assert y.shape == (0, 64) and y.dtype == w.grad.dtype == torch.bfloat16
    assert w.grad.count_nonzero() == 0
    x = torch.randn(5, 32, requires_grad=True)
    fp8_linear(x, w.detach().float(), recipe).sum().backward()
    assert x.grad.shape == x.shape
