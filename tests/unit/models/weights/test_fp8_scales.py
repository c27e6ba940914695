"""Scales of stored FP8 weights: read as their values, and written as the format names them.

Oracle of powers of two: 2 ** ceil(log2(amax / 448)) in fp64 (numpy)."""

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from megatron_r1.base.errors import Cause
from megatron_r1.models.weights import hf_tensors
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.known_scales import KnownScales
from megatron_r1.models.weights.formats.quantized_blocks import quantize_fp8

HF = {
    **{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 32, "hidden_size": 64, "head_dim": 32},
    **{"intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6},
}
NAME = "model.layers.0.mlp.up_proj.weight"


def write_weights(folder, scales):
    """Write a checkpoint whose tensor NAME is FP8; return its codes."""
    tensors = {name: torch.zeros(shape).bfloat16() for name, (shape, _) in hf_tensors(HF).items()}
    tensors[NAME] = torch.randn(192, 64).to(torch.float8_e4m3fn)
    save_file({**tensors, f"{NAME}_scale_inv": scales}, folder / "model.safetensors")
    return tensors[NAME]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_any_float_type_are_read_as_their_values(tmp_path, dtype):
    scales = torch.tensor([[0.0123], [3.21]]).to(dtype)
    codes = write_weights(tmp_path, scales)
    with HFWeights(tmp_path, HF) as weights:
        weights.check(with_mtp=False)
        values = weights.read(NAME, 0, 0, 192)
        assert torch.equal(weights.scales(NAME), scales.float())
    expected = codes.float() * scales.float().repeat_interleave(128, 0)[:192]
    assert torch.equal(values, expected)
    assert torch.equal(KnownScales(tmp_path, HF).rows(NAME, 128, 64), scales[1:].float())


@pytest.mark.parametrize("exponents", [(0, 1), (119, 127), (128, 254)])
@pytest.mark.parametrize("is_named", [True, False])
def test_exponents_alone_are_powers_of_two(tmp_path, exponents, is_named):
    stored = torch.tensor(exponents, dtype=torch.uint8)[:, None]
    codes = write_weights(tmp_path, stored.view(torch.float8_e8m0fnu) if is_named else stored)
    expected = torch.tensor([[2.0 ** (exponent - 127)] for exponent in exponents])
    assert torch.equal(expected, stored.view(torch.float8_e8m0fnu).float())  # torch's own reading
    with HFWeights(tmp_path, HF) as weights:
        weights.check(with_mtp=False)
        assert torch.equal(weights.scales(NAME), expected)
        values = weights.read(NAME, 0, 0, 192)
    assert torch.equal(values, codes.float() * expected.repeat_interleave(128, 0)[:192])
    assert torch.equal(KnownScales(tmp_path, HF).rows(NAME, 0, 192), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e5m2])
def test_scales_of_another_kind_are_refused_by_name(tmp_path, dtype):
    write_weights(tmp_path, torch.ones(2, 1).to(dtype))
    with HFWeights(tmp_path, HF) as weights, refused("weights", Cause.CONFLICT, NAME, "F8_E8M0"):
        weights.check(with_mtp=False)


def powers_of_two(x):
    """Return the fp64 scales of blocks of 128 x 128: 2 ** ceil(log2(amax / 448))."""
    down, across = -(-x.shape[0] // 128), -(-x.shape[1] // 128)
    found = np.empty((down, across))
    for i, j in np.ndindex(down, across):
        block = x[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].double().numpy()
        found[i, j] = 2.0 ** np.ceil(np.log2(max(np.abs(block).max(), np.float32(1e-4)) / 448))
    return torch.from_numpy(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_blocks_get_the_power_of_two_above_amax_by_448(dtype):
    x = (torch.randn(300, 520) * torch.logspace(-9, 6, 520)).to(dtype)
    # Where the next number decides: amax is 448 x 2^k, the number above, or the number below.
    for block, exponent in enumerate((7, 0, -9)):
        number = torch.tensor(448.0 * 2.0**exponent, dtype=dtype)
        edges = [number, *(torch.nextafter(number, number * 0 + to) for to in (torch.inf, 0.0))]
        x[block * 128 : (block + 1) * 128, :384] *= 1e-3 * 2.0**exponent
        for column, edge in enumerate(edges):
            x[block * 128, column * 128] = edge
    q, scales = quantize_fp8(x, power_of_two=True)
    expected = powers_of_two(x)
    assert torch.equal(scales.double(), expected)
    spread = expected.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :520]
    assert torch.equal(q.double(), (x.double() / spread).float().to(torch.float8_e4m3fn).double())


def test_blocks_that_are_unchanged_keep_every_bit_of_a_checkpoint_with_powers_of_two():
    """Also where the largest code is at most 224, so that amax gives half of the scale."""
    codes = torch.randn(256, 256).clamp(-3, 3).mul(60).to(torch.float8_e4m3fn)
    known = torch.tensor([[2.0**-12, 2.0**-3], [2.0**-20, 2.0**4]])
    x = (codes.float() * known.repeat_interleave(128, 0).repeat_interleave(128, 1)).bfloat16()
    q, scales = quantize_fp8(x, known, power_of_two=True)
    assert torch.equal(scales, known)
    assert torch.equal(q.view(torch.uint8), codes.view(torch.uint8))
    x[128:, 128:] *= 1.5  # trained
    q, scales = quantize_fp8(x, known, power_of_two=True)
    assert torch.equal(scales[:, 0], known[:, 0]) and scales[0, 1] == known[0, 1]
    assert scales[1, 1] == powers_of_two(x)[1, 1]
