import json
import shutil
from collections import namedtuple

import pytest
import torch
from random_folder import write_folder
from safetensors.torch import load_file, save_file
from small_models import MODELS

from megatron_r1.base.errors import Cause


@pytest.fixture
def hf_folder(tmp_path):
    return write_folder(tmp_path / "hf", MODELS["deepseek-yarn-mtp"], torch.bfloat16)


@pytest.fixture
def megatron(convert, hf_folder, tmp_path):
    status, output = convert("from-hf", hf_folder, tmp_path / "megatron")
    assert status == 0, output
    return tmp_path / "megatron"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_verify_finds_one_flipped_bit_and_says_where(convert, hf_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(hf_folder, other)
    status, output = convert("verify", hf_folder, other)
    assert status == 0 and "173 of 173" in output, output
    tensors = load_file(hf_folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name].view(torch.int16)[3, 7] ^= 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    status, output = convert("verify", hf_folder, other)
    assert status == 1
    changed = load_file(hf_folder / "model.safetensors")[name].float() - tensors[name].float()
    gap = f"{changed.abs().max().item():.6g}"
    (line,) = (line for line in output.splitlines() if name in line)
    assert gap in line and "[3, 7]" in line, line
    assert "172 of 173" in output, output


def test_verify_tells_other_dtypes_from_other_values(convert, hf_folder, megatron, tmp_path):
    wide = tmp_path / "wide"
    assert convert("to-hf", megatron, wide, "--dtype", "float32", "--no-check")[0] == 0
    status, output = convert("verify", hf_folder, wide)
    assert status == 0 and "bfloat16" in output and "float32" in output, output
    tensors = load_file(wide / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1.5
    del tensors["model.layers.4.hnorm.weight"]
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    status, output = convert("verify", megatron, wide, "--config", hf_folder)
    assert status == 1
    changed, lacking = (line for line in output.splitlines() if ".weight: " in line)
    assert {"lm_head.weight", "model.layers.4.hnorm.weight"} == {
        line.split(":")[0] for line in (changed, lacking)
    }
    assert "[0, 0]" in output, output


def test_a_damaged_checkpoint_is_not_converted(convert, megatron, tmp_path):
    data, out = megatron / "__0_0.distcp", tmp_path / "out"
    flip(data, data.stat().st_size // 2)
    damaged = "checkpoint", Cause.MALFORMED, "to-hf", megatron
    convert.refuses(*damaged, out, shows=("__0_0.distcp",))
    assert not out.exists() and not (tmp_path / "out.incomplete").exists()
    assert convert("to-hf", megatron, out, "--checksums", "none", "--no-check")[0] == 0
    data.write_bytes(data.read_bytes()[:-5000])
    size = data.stat().st_size
    convert.refuses(*damaged, tmp_path / "cut", "--checksums", "none", shows=("__0_0", size))
    data.unlink()
    lacking = ("to-hf", megatron, tmp_path / "no", "--checksums", "none")
    convert.refuses("checkpoint", Cause.NOT_FOUND, *lacking, shows=("__0_0",))


def test_a_damaged_hugging_face_folder_is_not_converted(convert, hf_folder, tmp_path):
    weights, out = hf_folder / "model.safetensors", tmp_path / "out"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    damaged = "weights", Cause.MALFORMED, "from-hf", hf_folder, out
    convert.refuses(*damaged, shows=(weights,))
    weights.write_bytes(content + b"more")
    convert.refuses(*damaged, shows=(weights, len(content) + 4))
    weights.write_bytes(b"\xff" * 8 + content[8:])
    convert.refuses(*damaged, shows=(weights,))
    weights.unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (hf_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    absent = "model-00002-of-00002.safetensors"
    convert.refuses("weights", Cause.NOT_FOUND, "from-hf", hf_folder, out, shows=(absent,))


def test_every_tensor_is_read_once_or_named(convert, hf_folder, tmp_path):
    weights, out = hf_folder / "model.safetensors", tmp_path / "out"
    tensors = load_file(weights)

    copy = "model.layers.4.shared_head.head.weight"
    for name, value in (
        ("model.layers.1.self_attn.sinks", torch.zeros(4)),
        ("model.layers.1.mlp.gate.weight_scale_inv", torch.zeros(1, 1)),
        (copy, tensors[copy] * 1.5),
    ):
        save_file(tensors | {name: value}, weights, metadata={"format": "pt"})
        convert.refuses("weights", Cause.CONFLICT, "from-hf", hf_folder, out, shows=(name,))
    save_file(tensors, weights, metadata={"format": "pt"})
    save_file({copy: tensors[copy]}, hf_folder / "more.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(tensors, weights.name) | {copy: "more.safetensors"}
    index = hf_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    twice = (copy, weights, "more.safetensors")
    convert.refuses("weights", Cause.DUPLICATE, "from-hf", hf_folder, out, shows=twice)

    tied = write_folder(tmp_path / "tied", MODELS["qwen-tied"], torch.bfloat16)
    tensors = load_file(tied / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, tied / "model.safetensors", metadata={"format": "pt"})
    assert convert("from-hf", tied, tmp_path / "same")[0] == 0
    head["lm_head.weight"][1, 1] += 1
    save_file(tensors | head, tied / "model.safetensors", metadata={"format": "pt"})
    shows = ("lm_head.weight", "tie_word_embeddings")
    convert.refuses("weights", Cause.CONFLICT, "from-hf", tied, out, shows=shows)
    assert not out.exists()


def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    convert, hf_folder, megatron, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    other = write_folder(tmp_path / "qwen", MODELS["qwen-untied"], torch.bfloat16)
    conflict, inside = Cause.CONFLICT, megatron / "in" / "side"
    for key, cause, arguments, *shows in (
        ("out", Cause.EXISTS, ("from-hf", hf_folder, megatron), megatron),
        ("out", conflict, ("from-hf", hf_folder, hf_folder / "inside"), hf_folder),
        ("out", conflict, ("to-hf", megatron, inside), megatron),
        ("--max-file-bytes", Cause.OUT_OF_RANGE, ("to-hf", megatron, out, "--max-file-bytes", 0)),
        ("--workers", Cause.OUT_OF_RANGE, ("to-hf", megatron, out, "--workers", 0)),
        ("checkpoint", conflict, ("to-hf", hf_folder, out), hf_folder),
        ("checkpoint", Cause.NOT_FOUND, ("to-hf", tmp_path / "ghost", out), "ghost"),
        ("hf", Cause.NOT_FOUND, ("from-hf", megatron, out), megatron),
        ("checkpoint", conflict, ("to-hf", megatron, out, "--config", other), "Qwen2ForCausalLM"),
    ):
        convert.refuses(key, cause, *arguments, shows=tuple(shows))
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        for arguments in (("to-hf", megatron, out), ("from-hf", hf_folder, out)):
            convert.refuses("out", Cause.TOO_LARGE, *arguments, shows=("1,000",))
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["Gpt2LMHeadModel"]})
    )
    unsupported = "architectures", Cause.UNSUPPORTED
    convert.refuses(*unsupported, "from-hf", hf_folder, out, shows=("Gpt2LMHeadModel",))
    (hf_folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 5}))
    for arguments in (("from-hf", hf_folder, out), ("to-hf", megatron, out, "--config", hf_folder)):
        convert.refuses(
            "num_experts_per_tok", conflict, *arguments, shows=(hf_folder, 5, "topk_group")
        )
    assert not list(tmp_path.glob("out*"))
