"""What counts as a good export of a rehearsal, in fp32 as in bf16."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.rehearse import check_export, model

ROOT = Path(__file__).parents[3]
MTP = "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A miniature of DeepSeek-V3 with two layers and an MTP layer."""
    hf_config = read_hf_config(ROOT / "examples/deepseek_r1/model", None)
    folder = tmp_path_factory.mktemp("model")
    model.write_random_model_folder(
        folder, model.shrink_config(hf_config, num_layers=2, fp8=False), seed=0
    )
    return folder


def test_the_miniature_is_a_checkpoint_that_training_accepts(folder):
    with HFWeights(folder, read_hf_config(folder, None)) as weights:
        weights.check(with_mtp=True)
        weights.check_repeated()


def export(folder, to, dtype, *changed, mtp="frozen"):
    to.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name in changed:
        tensors[name] += 0.25
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config))
    return check_export.main(str(to), str(folder), mtp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_must_have_changed_and_frozen_layers_not(folder, tmp_path, dtype):
    trained = "model.layers.1.self_attn.o_proj.weight"
    assert "1 changed" in export(folder, tmp_path / "good", dtype, trained)
    with pytest.raises(SystemExit, match="no tensor"):
        export(folder, tmp_path / "same", dtype)
    with pytest.raises(SystemExit, match=f"frozen.*{MTP}"):
        export(folder, tmp_path / "moved", dtype, trained, MTP)
    assert "2 changed" in export(folder, tmp_path / "both", dtype, trained, MTP, mtp="train")
    with pytest.raises(SystemExit, match="mtp: train"):
        export(folder, tmp_path / "left", dtype, trained, mtp="train")
