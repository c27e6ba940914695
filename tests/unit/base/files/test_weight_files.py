"""Files of a model folder against the index that names them. No tensor is read."""

import json
import os

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from megatron_r1.base.errors import Cause
from megatron_r1.base.files.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    read_index,
    require_complete,
    weight_files,
)

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder, files, index=None):
    """Write files of these tensors, and an index, by default the one that fits."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        save_file({name: torch.zeros(2) for name in names}, folder / file)
    own = {name: file for file, names in files.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": own if index is None else index}))
    return folder


def test_files_that_fit_their_index_are_whole(tmp_path):
    folder = write(tmp_path, {A: ["x", "y"], B: ["z"]})
    require_complete(folder)
    assert weight_files(folder) == [folder / A, folder / B]
    # Other files of the folder are nobody's, also where they have the same tensors.
    save_file({"x": torch.ones(2)}, folder / "consolidated.safetensors")
    require_complete(folder)


@pytest.mark.parametrize(
    ("files", "index", "cause", "shown"),
    [
        ({A: ["x"], B: ["z"]}, {"x": A, "y": A, "z": B}, Cause.CONFLICT, "y is not in"),
        ({A: ["x"], B: ["y"]}, {"x": A, "y": A, "z": B}, Cause.CONFLICT, "y is not in"),
        ({A: ["x"], B: ["x", "z"]}, {"x": A, "z": B}, Cause.DUPLICATE, "x: in"),
        ({A: ["x"], B: ["z"]}, {"x": A, "z": "gone.safetensors"}, Cause.NOT_FOUND, "gone"),
        ({A: ["x"]}, {"x": A, "y": "tokenizer.json"}, Cause.MALFORMED, "tokenizer.json"),
        ({A: ["x"]}, {"x": A, "y": ""}, Cause.MALFORMED, INDEX_FILE),
        ({A: ["x"]}, {"x": A, "y": 7}, Cause.MALFORMED, INDEX_FILE),
        ({A: ["x"]}, {"x": A, "y": "a" * 5000}, Cause.MALFORMED, INDEX_FILE),
        ({A: ["x"]}, {}, Cause.MALFORMED, INDEX_FILE),
        ({A: ["x"]}, [], Cause.MALFORMED, INDEX_FILE),
    ],
)
def test_an_index_that_does_not_fit_is_named_with_the_tensor(tmp_path, files, index, cause, shown):
    write(tmp_path, files, index)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused("weights", cause, tmp_path, shown):
        require_complete(tmp_path)


def test_buffers_that_no_model_reads_may_be_missing(tmp_path):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    require_complete(write(tmp_path, {A: ["x"], B: ["z"]}, {"x": A, "z": B, buffer: A}))


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}',
        '{"weight_map": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001,
        '{"weight_map": ' + '{"a": ' * 1_000 + "1" + "}" * 1_001,
        '{"weight_map": {"x": ' + "9" * 10_000 + "}}",
    ],
)
def test_an_index_that_is_no_plain_json_is_refused(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with refused("weights", Cause.MALFORMED, INDEX_FILE):
        read_index(tmp_path)


@pytest.fixture
def outside(tmp_path):
    """A file of weights that is no part of the folder `tmp_path/model`."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "secret.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    return file


def refuses_to_open(folder, outside, monkeypatch):
    """Assert that the folder is refused, and that nothing opened the file outside."""
    opened = []
    monkeypatch.setattr(
        os, "open", lambda path, *args, real=os.open: opened.append(str(path)) or real(path, *args)
    )
    with refused("weights", Cause.CONFLICT, outside):
        require_complete(folder)
    assert not [path for path in opened if path.endswith("secret.safetensors")]


@pytest.mark.parametrize("form", ["../{}", "a/../../{}", "{absolute}"])
def test_a_file_elsewhere_that_an_index_names_is_not_opened(tmp_path, outside, form, monkeypatch):
    name = form.format(outside.name, absolute=outside)
    (tmp_path / "model" / "a").mkdir()
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": name}}))
    refuses_to_open(tmp_path / "model", outside, monkeypatch)


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_link_that_leads_elsewhere_is_not_opened(tmp_path, outside, is_indexed, monkeypatch):
    folder = tmp_path / "model"
    (folder / (A if is_indexed else SINGLE_FILE)).symlink_to(outside)
    if is_indexed:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": A}}))
    refuses_to_open(folder, outside, monkeypatch)


def test_links_of_a_hub_cache_and_within_a_folder_are_read(tmp_path):
    blobs = tmp_path / "hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "hub/models--org--name/snapshots/0123abcd"
    write(snapshot, {A: ["x"], B: ["z"]})
    for number, file in enumerate((A, B, INDEX_FILE)):
        (snapshot / file).rename(blobs / f"{number}")
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    require_complete(snapshot)
    (tmp_path / "chosen").symlink_to(snapshot)
    require_complete(tmp_path / "chosen")
    plain = tmp_path / "plain"
    save_file({"x": torch.zeros(2)}, (plain.mkdir() or plain) / "weights.safetensors")
    (plain / SINGLE_FILE).symlink_to("weights.safetensors")
    require_complete(plain)


def test_links_from_a_snapshot_to_another_model_are_refused(tmp_path, outside, monkeypatch):
    other = tmp_path / "hub/models--b--b/blobs"
    other.mkdir(parents=True)
    outside = outside.rename(other / outside.name)
    snapshot = tmp_path / "hub/models--a--a/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / SINGLE_FILE).symlink_to(outside)
    refuses_to_open(snapshot, outside, monkeypatch)


@pytest.mark.parametrize(
    ("entries", "shown"),
    [
        ({"x": ([2], [0, 8]), "y": ([2], [4, 12])}, "y begins at byte 4"),  # they overlap
        ({"x": ([2], [0, 8]), "y": ([2], [12, 20])}, "y begins at byte 12"),  # a hole
        ({"x": ([-2], [0, -8])}, "whole numbers"),
        ({"x": ([10**18], [0, 8])}, "its shape says otherwise"),
    ],
)
def test_a_header_that_describes_no_file_is_refused(tmp_path, entries, shown):
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        for name, (shape, offsets) in entries.items()
    }
    text = json.dumps(header).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(20))
    with refused("weights", Cause.MALFORMED, SINGLE_FILE, shown):
        require_complete(tmp_path)
