import json
import shutil
from pathlib import Path

import pytest
import torch
from fp8_folder import publish
from random_folder import write_folder
from ranks import run_ranks
from refusals import refused
from safetensors.torch import load_file, save_file
from small_models import MODELS
from wide_model import WIDE

from megatron_r1.base.errors import Cause
from megatron_r1.commands.convert import reload_check

CHECKED = {**MODELS, "wide": WIDE}


@pytest.mark.slow
def test_converted_checkpoints_are_what_megatron_saves_and_loads(convert, tmp_path):
    for name, hf_config in CHECKED.items():
        source = write_folder(tmp_path / f"{name}-hf", hf_config, torch.bfloat16)
        assert convert("from-hf", source, tmp_path / f"{name}-converted")[0] == 0
    # Two ranks cut 300 rows in the middle of a block.
    values = publish(tmp_path / "wide-hf", tmp_path / "wide-fp8", "odd")
    plain = tmp_path / "wide-fp8-values"
    shutil.copytree(tmp_path / "wide-hf", plain)
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    for ranks in (1, 2):
        output = run_ranks(Path(__file__).parent, ranks, "saved_by_megatron.py", str(tmp_path))
        for name in CHECKED:
            assert f"{name} on {ranks}: saved = converted" in output
            assert f"{name} on {ranks}: Megatron loads what was converted" in output
            assert f"{name} on {ranks}: a flipped bit is refused on every rank" in output
        assert f"wide on {ranks}: FP8 read" in output


@pytest.mark.parametrize(
    "model, dtype",
    [
        ("deepseek-yarn-mtp", "fp8"),
        pytest.param("qwen-tied", "bfloat16", marks=pytest.mark.more),
    ],
)
def test_the_result_computes_the_checkpoints_logits(convert, oracle, tmp_path, model, dtype):
    assert convert("from-hf", oracle / model, tmp_path / "megatron")[0] == 0
    arguments = ("--dtype", dtype, "--config", oracle / model)
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "out", *arguments)
    assert status == 0 and dtype.replace("fp8", "FP8") in output, output


@pytest.mark.slow
def test_a_model_type_that_transformers_does_not_know_is_checked_by_its_architecture(
    convert, oracle, tmp_path
):
    model = tmp_path / "kimi"
    shutil.copytree(oracle / "kimi", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    assert convert("from-hf", model, tmp_path / "megatron")[0] == 0
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "out")
    assert status == 0 and "logits" in output, output


@pytest.mark.more
def test_a_result_that_computes_something_else_is_refused(convert, oracle, tmp_path):
    checkpoint, out = tmp_path / "megatron", tmp_path / "out"
    assert convert("from-hf", oracle / "llama3", checkpoint)[0] == 0
    assert convert("to-hf", checkpoint, out, "--no-check")[0] == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] *= 1.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with refused("out", Cause.CONFLICT, out, checkpoint):
        reload_check.check_reload(checkpoint, out, out, torch.float32, 1)
