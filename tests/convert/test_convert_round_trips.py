import json

import pytest
import torch
from fp8_folder import dequantize, publish
from random_folder import write_folder
from safetensors.torch import load_file, save_file
from small_models import FIRST, MODELS
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from wide_model import WIDE

from megatron_r1.base.errors import Cause

FP8_MODELS = {"deepseek": WIDE, "qwen": MODELS["qwen-tied"], "llama": MODELS["llama3"]}


def tensors_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_bits(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        same = torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        assert same, f"{name} has other bits"


@pytest.mark.first_cases(4)
@pytest.mark.parametrize(
    "model, dtype",
    [(name, torch.bfloat16) for name in MODELS] + [(name, torch.float32) for name in FIRST],
)
def test_plain_weights_come_back_bit_by_bit(convert, tmp_path, model, dtype):
    source = write_folder(tmp_path / "hf", MODELS[model], dtype)
    status, output = convert("from-hf", source, tmp_path / "megatron")
    assert status == 0, output
    arguments = ("--no-check", "--max-file-bytes", 60_000)
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "back", *arguments)
    assert status == 0, output
    back = tmp_path / "back"
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same_bits(tensors_in(source), tensors_in(back))
    index = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        assert name in load_file(back / file)
    assert index.keys() == tensors_in(source).keys()
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert (back / "tokenizer_config.json").read_bytes() == (
        source / "tokenizer_config.json"
    ).read_bytes()
    assert convert("verify", source, back)[0] == 0
    assert convert("verify", tmp_path / "megatron", back)[0] == 0


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["amax", "powers", "odd"])
@pytest.mark.parametrize("model", FP8_MODELS)
def test_fp8_weights_come_back_bit_by_bit(convert, tmp_path, model, kind, dtype):
    plain = write_folder(tmp_path / "plain", FP8_MODELS[model], torch.float32)
    source = tmp_path / "fp8"
    values = publish(plain, source, kind)
    assert sum(n.endswith("_scale_inv") for n in tensors_in(source)) > 10
    status, output = convert("from-hf", source, tmp_path / "megatron", "--dtype", dtype)
    assert status == 0, output
    status, output = convert(
        "to-hf", tmp_path / "megatron", tmp_path / "back", "--dtype", "fp8", "--no-check"
    )
    assert status == 0, output
    assert_same_bits(tensors_in(source), tensors_in(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    # In between lie the values that DeepSeek's formula gives.
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "wide", "--no-check")
    assert status == 0, output
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())
    for name, found in tensors_in(tmp_path / "wide").items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else getattr(torch, dtype)
        assert torch.equal(found, values[name].to(kept)), name
    status, output = convert("verify", source, tmp_path / "wide")
    assert status == 0 and "FP8" in output, output


def test_trained_weights_get_scales_of_their_own(convert, tmp_path):
    """Where a block has changed since it was FP8, its amax decides, not the old scale."""
    plain = write_folder(tmp_path / "plain", WIDE, torch.float32)
    publish(plain, tmp_path / "fp8", "odd")
    published = tensors_in(tmp_path / "fp8")
    convert("from-hf", tmp_path / "fp8", tmp_path / "megatron")
    # Trained: what a run would have saved, next to the scales of the model it started from.
    changed = tmp_path / "changed"
    convert("to-hf", tmp_path / "megatron", changed, "--no-check")
    tensors, name = tensors_in(changed), "model.layers.0.mlp.up_proj.weight"
    tensors[name][200, 150] *= 50
    from safetensors.torch import save_file

    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert convert("from-hf", changed, tmp_path / "trained")[0] == 0
    out = tmp_path / "out"
    arguments = ("--dtype", "fp8", "--no-check", "--config", tmp_path / "fp8")
    assert convert("to-hf", tmp_path / "trained", out, *arguments)[0] == 0
    found = tensors_in(out)
    old, new = (t[f"{name}_scale_inv"] for t in (published, found))
    assert (old != new).nonzero().tolist() == [[1, 1]]
    largest = tensors[name][128:256, 128:192].float().abs().max()
    assert torch.equal(new[1, 1], largest / torch.tensor(448.0))
    rebuilt = dequantize(found[name], new)
    assert (rebuilt - tensors[name].float()).abs().max() <= largest * 2**-4
    status, output = convert("verify", tmp_path / "trained", out, "--config", tmp_path / "fp8")
    assert status == 0, output
    status, output = convert("verify", tmp_path / "fp8", out)
    assert status == 1 and output.startswith(name), output


def test_mxfp4_becomes_the_bf16_weights_of_transformers(convert, tmp_path):
    hf_config = {**MODELS["gpt-oss"], "hidden_size": 64, "intermediate_size": 96}
    source = write_folder(tmp_path / "mxfp4", hf_config, torch.bfloat16)
    expected = tensors_in(source)
    draw = torch.Generator().manual_seed(0)
    stored = {}
    for name, tensor in expected.items():
        if tensor.dim() < 3:
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        scales = (experts, rows, columns // 32)
        parts = [
            torch.randint(0, 256, (*scales, 16), generator=draw).to(torch.uint8),
            torch.randint(110, 130, scales, generator=draw).to(torch.uint8),
        ]
        stored |= zip((f"{name}_blocks", f"{name}_scales"), parts, strict=True)
        expected[name] = convert_moe_packed_tensors(*parts, dtype=torch.bfloat16)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    published = config | {"quantization_config": {"quant_method": "mxfp4"}}
    (source / "config.json").write_text(json.dumps(published))

    status, output = convert("from-hf", source, tmp_path / "megatron")
    assert status == 0, output
    assert convert("verify", source, tmp_path / "megatron")[0] == 0
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "back", "--no-check")
    assert status == 0, output
    assert_same_bits(expected, tensors_in(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    arguments = ("to-hf", tmp_path / "megatron", tmp_path / "fp8", "--dtype", "fp8")
    convert.refuses("fp8", Cause.UNSUPPORTED, *arguments, shows=("GptOssForCausalLM",))
