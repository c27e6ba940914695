"""What survives a power cut: files, their names, and the folders created for them."""

import os
from pathlib import Path

import pytest

from megatron_r1.base.files import atomic_write, make_folder


@pytest.fixture
def synced(monkeypatch):
    """The paths of every file and folder that was synced, in order."""
    paths, upstream = [], os.fsync

    def fsync(descriptor):
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        upstream(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def test_the_folders_created_for_a_file_are_synced_from_the_first_on(synced, tmp_path):
    new = tmp_path / "new"
    path = atomic_write(new / "deeper" / "file.json", "{}")
    assert path.read_text() == "{}"
    *folders, content, parent = synced
    assert folders == [tmp_path, new] and parent == new / "deeper"
    assert content.name.startswith(".file.json.") and content.parent == parent
    synced.clear()
    atomic_write(path, "[]")
    assert synced[1:] == [parent]


def test_what_need_not_be_durable_is_not_synced(synced, tmp_path):
    assert atomic_write(tmp_path / "new" / "file", "x", durable=False).read_text() == "x"
    assert synced == []


def test_a_folder_that_exists_is_left_as_it_is(synced, tmp_path):
    make_folder(tmp_path)
    assert synced == []
    with pytest.raises(FileExistsError):
        make_folder(atomic_write(tmp_path / "file", ""))
