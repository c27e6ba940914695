"""Score models through the converter and back, and a language model's config.json next to one."""

import json
import shutil

import pytest
import torch
from random_folder import write_folder
from safetensors.torch import load_file
from small_models import MODELS

SCORED = ("qwen-tied", "llama3", "deepseek-yarn-mtp")


def scored(name: str) -> dict:
    hf_config = MODELS[name]
    kind = hf_config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    return {**hf_config, "architectures": [kind], "num_labels": 1, "num_nextn_predict_layers": 0}


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SCORED)
def test_a_score_model_comes_back_bit_by_bit(convert, tmp_path, name, dtype):
    # As read here: without a tied embedding, of which a score model has no use.
    source = write_folder(tmp_path / "hf", {**scored(name), "tie_word_embeddings": False}, dtype)
    before = load_file(source / "model.safetensors")
    assert before["score.weight"].shape == (1, 48) and "lm_head.weight" not in before
    status, output = convert("from-hf", source, tmp_path / "megatron")
    assert status == 0, output
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "back", "--no-check")
    assert status == 0, output
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == before.keys()
    for key, values in before.items():
        assert torch.equal(after[key].view(torch.uint8), values.view(torch.uint8)), key
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    ]
    assert configs[0] == configs[1]
    assert convert("verify", source, tmp_path / "megatron")[0] == 0


def test_the_checkpoint_says_that_it_is_a_score_model_where_config_json_does_not(convert, tmp_path):
    source = write_folder(tmp_path / "hf", scored("llama3"), torch.float32)
    assert convert("from-hf", source, tmp_path / "megatron")[0] == 0
    shutil.rmtree(tmp_path / "megatron/huggingface")
    language = write_folder(tmp_path / "language", MODELS["llama3"], torch.float32)
    arguments = ("--config", language, "--no-check", "--checksums", "none")
    status, output = convert("to-hf", tmp_path / "megatron", tmp_path / "back", *arguments)
    assert status == 0, output
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["num_labels"] == 1 and config["id2label"] == {"0": "score"}
    assert "score.weight" in load_file(tmp_path / "back/model.safetensors")
