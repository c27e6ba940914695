import json
import shutil
from collections import namedtuple

import pytest
import torch
from random_folder import write_folder
from safetensors.torch import load_file, save_file
from small_models import MODELS


@pytest.fixture
def hf(tmp_path):
    return write_folder(tmp_path / "hf", MODELS["deepseek-yarn-mtp"], torch.bfloat16)


@pytest.fixture
def megatron(convert, hf, tmp_path):
    status, output = convert("from-hf", hf, tmp_path / "megatron")
    assert status == 0, output
    return tmp_path / "megatron"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def refused(outcome, *parts):
    status, output = outcome
    assert status == 2, output
    assert all(part in output for part in parts), output


def test_verify_finds_one_flipped_bit_and_says_where(convert, hf, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    assert convert("verify", hf, other) == (0, "173 of 173 tensors equal\n")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name].view(torch.int16)[3, 7] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    status, output = convert("verify", hf, other)
    assert status == 1
    changed = load_file(hf / "model.safetensors")[name].float() - tensors[name].float()
    gap = f"{changed.abs().max().item():.6g}"
    assert f"{name}: 1 element differs, max |Δ| {gap} at [3, 7]" in output
    assert "172 of 173 tensors equal" in output


def test_verify_tells_other_dtypes_from_other_values(convert, hf, megatron, tmp_path):
    wide = tmp_path / "wide"
    assert convert("to-hf", megatron, wide, "--dtype", "float32", "--no-check")[0] == 0
    status, output = convert("verify", hf, wide)
    assert status == 0
    assert (
        "tensors are bfloat16 in A and float32 in B: compared after rounding to bfloat16" in output
    )
    tensors = load_file(wide / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1.5
    del tensors["model.layers.4.hnorm.weight"]
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    status, output = convert("verify", megatron, wide, "--config", hf)
    assert status == 1
    assert "lm_head.weight: 1 element differs" in output and " at [0, 0]" in output, output
    assert "model.layers.4.hnorm.weight: only in one" in output


def test_a_damaged_checkpoint_is_not_converted(convert, megatron, tmp_path):
    data, out = megatron / "__0_0.distcp", tmp_path / "out"
    flip(data, data.stat().st_size // 2)
    named = "__0_0.distcp does not have the checksum it was written with"
    refused(convert("to-hf", megatron, out), named)
    assert not out.exists() and not (tmp_path / "out.incomplete").exists()
    assert convert("to-hf", megatron, out, "--checksums", "none", "--no-check")[0] == 0
    data.write_bytes(data.read_bytes()[:-5000])
    refused(convert("to-hf", megatron, tmp_path / "cut", "--checksums", "none"), "it is cut off")
    data.unlink()
    refused(
        convert("to-hf", megatron, tmp_path / "no", "--checksums", "none"), "lacks files: __0_0"
    )


def test_a_damaged_hugging_face_folder_is_not_converted(convert, hf, tmp_path):
    weights, out = hf / "model.safetensors", tmp_path / "out"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    refused(convert("from-hf", hf, out), str(weights), "it is cut off")
    weights.write_bytes(content + b"more")
    refused(convert("from-hf", hf, out), str(weights), f"the file at {len(content) + 4}")
    weights.write_bytes(b"\xff" * 8 + content[8:])
    refused(convert("from-hf", hf, out), str(weights), "its header claims")
    weights.unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(convert("from-hf", hf, out), "lacks: model-00002-of-00002.safetensors")


def test_every_tensor_is_read_once_or_named(convert, hf, tmp_path):
    weights, out = hf / "model.safetensors", tmp_path / "out"
    tensors = load_file(weights)

    def saved(**changes):
        save_file(tensors | changes, weights, metadata={"format": "pt"})
        return convert("from-hf", hf, out)

    extra = {"model.layers.1.self_attn.sinks": torch.zeros(4)}
    refused(saved(**extra), "unexpected (1): model.layers.1.self_attn.sinks")
    scale = {"model.layers.1.mlp.gate.weight_scale_inv": torch.zeros(1, 1)}
    refused(saved(**scale), "unexpected (1): model.layers.1.mlp.gate.weight_scale_inv")
    copy = "model.layers.4.shared_head.head.weight"
    other = {copy: tensors[copy] * 1.5}
    refused(saved(**other), f"{copy} differs from lm_head.weight", "model.mtp: none")
    save_file(tensors, weights, metadata={"format": "pt"})
    save_file({copy: tensors[copy]}, hf / "more.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(tensors, weights.name) | {copy: "more.safetensors"}
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    refused(convert("from-hf", hf, out), copy, "more.safetensors; remove one")

    tied = write_folder(tmp_path / "tied", MODELS["qwen-tied"], torch.bfloat16)
    tensors = load_file(tied / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, tied / "model.safetensors", metadata={"format": "pt"})
    assert convert("from-hf", tied, tmp_path / "same")[0] == 0
    head["lm_head.weight"][1, 1] += 1
    save_file(tensors | head, tied / "model.safetensors", metadata={"format": "pt"})
    refused(convert("from-hf", tied, out), "lm_head.weight differs", "tie_word_embeddings")
    assert not out.exists()


def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    convert, hf, megatron, tmp_path, monkeypatch
):
    refused(convert("from-hf", hf, megatron), f"{megatron} exists already; remove it")
    refused(convert("from-hf", hf, hf / "inside"), f"is inside {hf}")
    refused(convert("to-hf", megatron, megatron / "in" / "side"), f"is inside {megatron}")
    none = ("--max-file-bytes", "0")
    refused(convert("to-hf", megatron, tmp_path / "out", *none), "0 must be at least 1")
    refused(convert("to-hf", hf, tmp_path / "out"), "is a Hugging Face folder")
    refused(convert("to-hf", tmp_path / "ghost", tmp_path / "out"), "ghost does not exist")
    refused(convert("from-hf", megatron, tmp_path / "out"), "has no config.json")
    other = write_folder(tmp_path / "qwen", MODELS["qwen-untied"], torch.bfloat16)
    refused(
        convert("to-hf", megatron, tmp_path / "out", "--config", other),
        "does not fit the configuration of Qwen2ForCausalLM",
    )
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(convert("to-hf", megatron, tmp_path / "out"), "more bytes", "1,000 free")
        refused(convert("from-hf", hf, tmp_path / "out"), "more bytes", "1,000 free")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "architectures": ["Gpt2LMHeadModel"]}))
    refused(convert("from-hf", hf, tmp_path / "out"), "Gpt2LMHeadModel", "supported are")
    (hf / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 5}))
    refused(convert("from-hf", hf, tmp_path / "out"), "num_experts_per_tok=5", "topk_group")
    arguments = (megatron, tmp_path / "out", "--config", hf)
    refused(convert("to-hf", *arguments), "num_experts_per_tok=5", "topk_group")
    assert not list(tmp_path.glob("out*"))
