import asyncio
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_qwen2 import MODEL

from megatron_r1 import cli
from megatron_r1.commands import check_model
from megatron_r1.errors import UserError
from megatron_r1.model_check import comparison
from megatron_r1.model_check.findings import Reference
from megatron_r1.rehearsal.model import write_folder


@pytest.fixture
def folder(tmp_path):
    """A Qwen2 with a tokenizer of 512 tokens and a chat template."""
    hf = {**MODEL, "vocab_size": 512, "eos_token_id": 1, "bos_token_id": 0}
    write_folder(tmp_path / "model", hf, seed=0)
    return tmp_path / "model"


def checked(capsys, *arguments):
    status = cli.main(["check-model", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def rewritten(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def test_keys_and_layouts_that_are_not_supported_are_named_at_once(folder, capsys):
    rewritten(folder / "config.json", attn_logit_softcapping=50.0)
    status, output = checked(capsys, folder)
    assert status == 2 and "attn_logit_softcapping=50.0 is not supported" in output
    assert "remove it from config.json" in output
    rewritten(folder / "config.json", attn_logit_softcapping=None)
    status, output = checked(capsys, folder, "--parallel.tensor", 4)
    assert status == 2 and "parallel.tensor=4 does not divide num_attention_heads=2" in output
    status, output = checked(capsys, folder, "--json")
    assert status == 2 and "--json needs a value" in output
    status, output = checked(capsys, folder, "--optimizer.clip_grad", 1)
    assert status == 2 and "check-model does not read it" in output


def test_missing_and_extra_tensors_are_named(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, output = checked(capsys, folder)
    assert status == 2, output
    assert "missing (1): model.layers.0.self_attn.k_proj.bias" in output
    assert "unexpected (1): model.layers.0.self_attn.sinks" in output


def test_a_tokenizer_of_another_size_is_named(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:260].clone()}, folder / "model.safetensors")
    rewritten(folder / "config.json", vocab_size=260)
    status, output = checked(capsys, folder)
    assert status == 2 and "vocab_size=260" in output, output
    assert "use the tokenizer that the model was trained with" in output


@pytest.mark.parametrize(
    "megatron, vllm, status, lines",
    [
        (1e-5, 2e-5, 0, ["Megatron   agrees", "vLLM       agrees"]),
        (1e-5, "NOT RUN: vllm is not installed", 0, ["vLLM       NOT RUN: vllm is not"]),
        (3e-4, 2e-5, 1, ["Megatron   DIFFERS: max |Δ log p| = 3.0e-04 (at most 1.0e-04)"]),
        (1e-5, 0.3, 1, ["vLLM       DIFFERS", "do not agree"]),
        (1e-5, "FAILED: the engine ended", 1, ["vLLM       FAILED: the engine ended"]),
    ],
)
def test_the_exit_status_is_0_only_if_all_agree(
    folder, capsys, monkeypatch, tmp_path, megatron, vllm, status, lines
):
    async def answer(value):
        return value

    reference = Reference(15, 512, True, [[1, 2, 3]], [[-1.0, -2.0]], 0.0)
    monkeypatch.setattr(check_model, "_reference", lambda *_: reference)
    monkeypatch.setattr(check_model, "by_megatron", lambda *_: answer(megatron))
    monkeypatch.setattr(check_model, "by_vllm", lambda *_: answer(vllm))
    found, output = checked(capsys, folder, "--json", tmp_path / "found.json")
    assert found == status and all(line in output for line in lines), output
    written = json.loads((tmp_path / "found.json").read_text())
    assert (written["agree"], written["vllm"]) == (not status, vllm)


def test_without_vllm_the_engine_is_reported_as_not_run(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    reference = Reference(15, None, False, [], [], 0.0)
    answer = asyncio.run(comparison.by_vllm(None, reference, tmp_path))
    assert answer == "NOT RUN: vllm is not installed in this environment"


def test_rounding_of_both_sides_is_tolerated():
    assert Reference(1, None, False, [], [], 0.0).tolerance == 1e-4
    assert Reference(1, None, False, [], [], 0.02).tolerance == 0.04
    with pytest.raises(UserError, match="config.json does not exist"):
        check_model.run(None, "nowhere")
