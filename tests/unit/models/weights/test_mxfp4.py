import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_r1.base.errors import Cause
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.weights.adapter_table import adapter_shapes, adapter_table
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.published_layout import published_tensors
from megatron_r1.models.weights.formats.stacked_experts import stacked_part
from megatron_r1.push.matching.layouts import EngineLayout
from megatron_r1.push.matching.recipe_plan import check_blocks

HF = {
    **{"architectures": ["GptOssForCausalLM"], "vocab_size": 32, "hidden_size": 64},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    **{"n_routed_experts": 3, "moe_intermediate_size": 96, "intermediate_size": 96},
}
EXPERTS = "model.layers.0.mlp.experts."


def packed_tensors():
    """Every tensor of HF, the experts' as MXFP4 with all codes and a wide range of exponents."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (shape, _) in published_tensors(HF).items():
        if len(shape) < 3:
            tensors[name] = torch.randn(shape, generator=draw).bfloat16()
            continue
        experts, columns, rows = shape
        scales = (experts, rows, columns // 32)
        codes = torch.randint(0, 256, (*scales, 16), generator=draw)
        tensors[name + "_blocks"] = codes.to(torch.uint8)
        tensors[name + "_scales"] = torch.randint(90, 160, scales, generator=draw).to(torch.uint8)
    return tensors


def test_experts_are_what_transformers_dequantizes(tmp_path):
    tensors = packed_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    with HFWeights(tmp_path, HF) as weights:
        weights.check(with_mtp=False)
        assert weights.tensors.keys() >= {
            EXPERTS + "2.up_proj.weight",
            EXPERTS + "0.down_proj.bias",
        }
        for name, (shape, dtype) in weights.tensors.items():
            got = weights.read(name, 0, 1, shape[0] - 1)
            part = stacked_part(HF, name)
            stored = part.name if part else name
            if stored + "_blocks" in tensors:
                packed = (tensors[stored + ending] for ending in ("_blocks", "_scales"))
                whole = convert_moe_packed_tensors(*packed, dtype=torch.bfloat16)
                assert dtype == "bfloat16"
            else:
                whole = tensors[stored]
            if part:
                step = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
                kind = name.split(".")[-2].removesuffix("_proj")
                whole = whole[int(name.split(".")[5])][..., step.get(kind, slice(None))]
                whole = whole.T if whole.dim() == 2 else whole
            assert torch.equal(got, whole[1:]), name
            if len(shape) == 2:
                assert torch.equal(weights.read(name, 1, 3, 20), whole[:, 3:23]), name


@pytest.mark.parametrize(
    "change, shows",
    [
        (lambda t: t.pop(EXPERTS + "down_proj_scales"), ["down_proj_scales"]),
        (lambda t: t.pop(EXPERTS + "down_proj_blocks"), ["down_proj", "down_proj_scales"]),
        (
            lambda t: t.update({EXPERTS + "gate_up_proj": torch.zeros(3, 64, 192)}),
            ["gate_up_proj_blocks"],
        ),
        (
            lambda t: t.update(
                {EXPERTS + "down_proj_scales": torch.zeros(3, 64, 2, dtype=torch.uint8)}
            ),
            ["down_proj_scales", (3, 64, 2), (3, 64, 3)],
        ),
    ],
)
def test_a_folder_with_other_tensors_is_refused(tmp_path, change, shows):
    tensors = packed_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with HFWeights(tmp_path, HF) as weights, refused("weights", Cause.CONFLICT, *shows):
        weights.check(with_mtp=False)


def test_experts_in_one_tensor_are_not_pushed_in_fp8():
    with refused("push.fp8", Cause.UNSUPPORTED, "GptOssForCausalLM"):
        check_blocks(HF, EngineLayout(), tensor=1, expert_tensor=1)


def test_experts_in_one_tensor_have_no_adapters():
    modules = {name.split(".lora_")[0] for name in adapter_shapes(adapter_table(HF, LoraConfig()))}
    assert modules == {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    with refused("model.lora.targets", Cause.UNKNOWN, "experts.up_proj"):
        adapter_table(HF, LoraConfig(targets=["experts.up_proj"]))
