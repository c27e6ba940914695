"""Durable writing: content is synced before its rename, and the folder after it."""

import os

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.weights import writing
from megatron_r1.weights.rules import Piece
from megatron_r1.weights.stored.safetensors_file import plan_file


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
