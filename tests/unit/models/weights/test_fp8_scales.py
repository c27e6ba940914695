import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from megatron_r1.base.errors import Cause
from megatron_r1.models.weights import hf_tensors
from megatron_r1.models.weights.stored.hf_folder import HfWeights, KnownScales

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
    with HfWeights(tmp_path, HF) as weights:
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
    with HfWeights(tmp_path, HF) as weights:
        weights.check(with_mtp=False)
        assert torch.equal(weights.scales(NAME), expected)
        values = weights.read(NAME, 0, 0, 192)
    assert torch.equal(values, codes.float() * expected.repeat_interleave(128, 0)[:192])
    assert torch.equal(KnownScales(tmp_path, HF).rows(NAME, 0, 192), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e5m2])
def test_scales_of_another_kind_are_refused_by_name(tmp_path, dtype):
    write_weights(tmp_path, torch.ones(2, 1).to(dtype))
    with HfWeights(tmp_path, HF) as weights, refused("weights", Cause.CONFLICT, NAME, "F8_E8M0"):
        weights.check(with_mtp=False)
