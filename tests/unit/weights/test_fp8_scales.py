import torch
from refusals import refused
from safetensors.torch import save_file

from megatron_r1.errors import Cause
from megatron_r1.weights import hf_tensors
from megatron_r1.weights.stored.hf_weights import HfWeights, KnownScales

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


def test_scales_stored_as_bf16_are_read_as_their_values(tmp_path):
    scales = torch.tensor([[0.0123], [3.21]]).bfloat16()
    codes = write_weights(tmp_path, scales)
    with HfWeights(tmp_path, HF) as weights:
        weights.check(with_mtp=False)
        values = weights.read(NAME, 0, 0, 192)
        assert torch.equal(weights.scales(NAME), scales.float())
    expected = codes.float() * scales.float().repeat_interleave(128, 0)[:192]
    assert torch.equal(values, expected)
    assert torch.equal(KnownScales(tmp_path, HF).rows(NAME, 128, 64), scales[1:].float())


def test_scales_of_another_kind_are_refused_by_name(tmp_path):
    write_weights(tmp_path, torch.ones(2, 1, dtype=torch.float16))
    with HfWeights(tmp_path, HF) as weights, refused("weights", Cause.CONFLICT, "F16", "F32"):
        weights.check(with_mtp=False)
