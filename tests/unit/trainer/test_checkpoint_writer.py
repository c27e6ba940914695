"""The files of a checkpoint are on disk before it has its name."""

from types import SimpleNamespace

from syncs import recorded_syncs

from megatron_r1.models import platform

platform.prepare_process()

from megatron_r1.trainer.checkpoints import manifest, writer  # noqa: E402
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, partial_path  # noqa: E402


def test_tensors_are_hashed_as_they_are_written_and_synced(tmp_path, monkeypatch):
    synced = recorded_syncs(monkeypatch)
    path = tmp_path / "__0_0.distcp"
    with writer.HashedFile(path) as file:
        file.write(b"some ")
        file.write(memoryview(b"bytes"))
        entry = file.entry()
    assert entry == manifest.file_entry(path) and entry.num_bytes == 10
    assert synced == [path]


def test_a_checkpoint_gets_its_name_when_it_is_whole_and_synced(tmp_path, monkeypatch):
    folder = tmp_path / "step_00000001"
    partial = partial_path(folder)
    partial.mkdir()
    with writer.HashedFile(partial / "__0_0.distcp") as file:
        file.write(b"weights")
        written = writer.WrittenFiles(0, {"__0_0.distcp": file.entry()})
    staged = SimpleNamespace(
        metadata=None, writer=SimpleNamespace(finish=lambda *_: (partial / ".metadata").touch())
    )
    synced = recorded_syncs(monkeypatch)
    assert writer._finish_save(staged, folder, {"step": 1}, [written]) is None
    assert not partial.exists() and manifest.manifest_faults(folder) == []
    assert {STATE_FILE, ".metadata", "metadata.json"} <= {path.name for path in synced}
    assert synced[-1] == tmp_path  # the new name


def test_a_rank_that_could_not_write_leaves_nothing(tmp_path):
    folder = tmp_path / "step_00000001"
    partial_path(folder).mkdir()
    failed = [writer.WrittenFiles(0), writer.WrittenFiles(1, error="No space left on device")]
    assert "rank 1" in writer._finish_save(SimpleNamespace(), folder, {}, failed)
    assert list(tmp_path.iterdir()) == []
