"""Durable writing: content is synced before its rename, and the folder after it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.model import LoraConfig
from megatron_r1.weights import writing
from megatron_r1.weights.adapters import stored
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stored import hf_folder
from megatron_r1.weights.stored.safetensors_file import plan_file

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture
def events(monkeypatch):
    """Every sync and rename of the writer, in order: (what, name)."""
    seen = []

    def recorded(what, function, position):
        def call(*paths):
            seen.append((what, paths[position].name))
            return function(*paths)

        return call

    monkeypatch.setattr(writing, "fsync", recorded("sync", writing.fsync, 0))
    monkeypatch.setattr(os, "replace", recorded("rename", os.replace, 1))
    monkeypatch.setattr(os, "rename", recorded("rename", os.rename, 1))
    return seen


@pytest.fixture
def synced(monkeypatch):
    """The names of all files and folders that are synced."""
    names, upstream = set(), os.fsync

    def fsync(descriptor):
        names.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        upstream(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def write(folder, durable):
    path = folder / "model.safetensors"
    held = [(torch.arange(6.0).reshape(3, 2), [Piece("weight", 0, 0, 0, 3)], True)]
    plan = plan_file({"weight": ((3, 2), torch.float32)})
    writing.write_pieces(held, {path: plan}, {}, durable=durable)
    return path


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_file_is_synced_before_its_rename_and_its_folder_after(events, tmp_path, durable):
    folder = tmp_path / "out"
    folder.mkdir()
    path = write(folder, durable)
    assert load_file(path)["weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
    rename = ("rename", "model.safetensors")
    durably = [("sync", "model.safetensors.incomplete"), rename, ("sync", "out")]
    assert events == (durably if durable else [rename])


def test_a_folder_is_renamed_when_its_files_are_synced_and_its_parent_after(events, tmp_path):
    (tmp_path / "hf").mkdir()
    with writing.new_folder(tmp_path / "hf", lambda folder: None) as folder:
        write(folder, durable=True)
    assert events == [
        ("sync", "model.safetensors.incomplete"),
        ("rename", "model.safetensors"),
        ("sync", "hf.incomplete"),
        ("rename", "hf.previous"),
        ("rename", "hf"),
        ("sync", tmp_path.name),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_small_files_beside_the_weights_are_synced(synced, tmp_path):
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (source / name).write_text("{}")
    with writing.new_folder(out, lambda folder: hf_folder.carry_files(source, folder)):
        pass
    assert sorted(path.name for path in out.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    files = {"chat_template.jinja", "tokenizer.json"}
    assert synced == {*files, "out.incomplete", "new", tmp_path.name}


def test_the_configuration_of_exported_adapters_is_synced(synced, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "adapter_pieces", lambda chunks: [])
    lora = LoraConfig(rank=2)
    stored.save_adapter([], QWEN2, lora, "base", tmp_path / "adapter", torch.float32)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert any(name.startswith(".adapter_config.json.") for name in synced)
