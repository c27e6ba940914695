"""Every rank writes its own bytes and no others; content is synced before its rename, and the
folder after it."""

import errno
import json
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file

from megatron_r1.base.errors import Cause
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.weights import adapters, export
from megatron_r1.models.weights.formats import hf_writer
from megatron_r1.models.weights.formats.stacked_experts import StackedPart
from megatron_r1.models.weights.formats.tensor_files import plan_file
from megatron_r1.models.weights.splits import Piece

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

    monkeypatch.setattr(export, "fsync", recorded("sync", export.fsync, 0))
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
    export.write_pieces(held, {path: plan}, {}, durable=durable)
    return path


NUM_EXPERTS, HIDDEN, INNER = 2, 3, 5
SHAPES = {
    "rows": (7, 3),  # split after row 3: 9 numbers of 2 bytes, no multiple of anything
    "columns": (4, 9),
    "vector": (5,),
    "tied": (7, 3),
    "gate_up": (NUM_EXPERTS, HIDDEN, 2 * INNER),
    "down": (NUM_EXPERTS, INNER, HIDDEN),
}


def part_of(name):
    """The parts of gpt-oss's stacked tensors, by names such as up.1."""
    kind, _, expert = name.partition(".")
    if kind not in ("gate", "up", "down"):
        return None
    stored = ("down", int(expert), 0, 1) if kind == "down" else None
    return StackedPart(*(stored or ("gate_up", int(expert), int(kind == "up"), 2)))


def held_by(rank, values):
    """Return (parameter, pieces, owner) of one of two ranks."""
    first = rank == 0
    rows, columns, inner = (0, 3) if first else (3, 4), (0, 5) if first else (5, 4), 2 + rank
    at = 0 if first else 2
    yield values["rows"].narrow(0, *rows), [Piece("rows", 0, rows[0], 0, rows[1])], True
    yield values["columns"].narrow(1, *columns), [Piece("columns", 1, columns[0], 0, columns[1])], 1
    yield values["vector"], [Piece("vector", 0, 0, 0, 5)], first
    for expert in range(NUM_EXPERTS):
        gate, up = (values["gate_up"][expert, :, which::2].T for which in (0, 1))
        fused = torch.cat([gate[at : at + inner], up[at : at + inner]])
        pieces = [
            Piece(f"gate.{expert}", 0, at, 0, inner),
            Piece(f"up.{expert}", 0, at, inner, inner),
        ]
        yield fused, pieces, True
        down = values["down"][expert].T[:, at : at + inner]
        yield down, [Piece(f"down.{expert}", 1, at, 0, inner)], True


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_each_rank_writes_its_own_bytes_and_no_others(tmp_path, monkeypatch, block_bytes):
    """Hosts of a network file system do not see each other's pages: a page written back whole
    would overwrite what another host has written."""
    monkeypatch.setattr(export, "BLOCK_BYTES", block_bytes)
    values = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    values["tied"] = values["rows"]
    plan = plan_file({name: (shape, torch.bfloat16) for name, shape in SHAPES.items()})
    path = tmp_path / "x.safetensors"
    export._create_file(path, plan)
    written, upstream = [], os.pwrite

    def pwrite(file, buffer, at):
        written.append((at, at + len(buffer)))
        return upstream(file, buffer, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for rank in (0, 1):
        files = export._OpenFiles({path: plan}, {path: path})
        for parameter, pieces, owner in held_by(rank, values):
            own = pieces if owner else ()
            export._write_parameter(files, parameter, own, {"rows": ["tied"]}, part_of)
        files.close()
    written.sort()
    assert written[0][0] == len(plan.header) and written[-1][1] == plan.num_bytes
    assert all(end == start for (_, end), (start, _) in pairwise(written)), "gap or overlap"
    stored_values = load_file(path)
    assert stored_values.keys() == values.keys()
    assert all(torch.equal(stored_values[name], values[name]) for name in values)


def test_a_disk_that_fills_up_is_a_users_error_that_names_the_file(tmp_path, monkeypatch):
    def pwrite(file, buffer, at):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with refused("output", Cause.UNREADABLE, tmp_path / "model.safetensors", "rank 0"):
        write(tmp_path, durable=False)


def test_files_that_do_not_fit_are_refused_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=0, f_frsize=4096))
    monkeypatch.setattr(os, "pwrite", None)
    with refused("output", Cause.UNREADABLE, tmp_path, "bytes"):
        write(tmp_path, durable=False)


def test_gate_without_up_is_no_part_of_a_file(tmp_path):
    plan = plan_file({"gate_up": (SHAPES["gate_up"], torch.float32)})
    held = [(torch.ones(INNER, HIDDEN), [Piece("gate.0", 0, 0, 0, INNER)], True)]
    with pytest.raises(ValueError, match="gate_up"):
        export.write_pieces(held, {tmp_path / "x": plan}, {}, part_of, durable=False)


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
    with export.write_folder(tmp_path / "hf", lambda folder: None) as folder:
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
    with export.write_folder(out, lambda folder: hf_writer.copy_model_files(source, folder)):
        pass
    assert sorted(path.name for path in out.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    files = {"chat_template.jinja", "tokenizer.json"}
    assert synced == {*files, "out.incomplete", "new", tmp_path.name}


def test_the_configuration_of_exported_adapters_is_synced(synced, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "adapter_pieces", lambda chunks: [])
    lora = LoraConfig(rank=2)
    adapters.save_adapter([], QWEN2, lora, "base", tmp_path / "adapter", torch.float32)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert any(name.startswith(".adapter_config.json.") for name in synced)
