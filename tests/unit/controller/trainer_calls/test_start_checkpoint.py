"""What `model.checkpoint` may be, and that a run's folder may be moved."""

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints import checkpoint_folders, manifest


def make(folder):
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    manifest.write_manifest(folder)
    return folder


def test_a_checkpoint_with_a_manifest_is_accepted_and_one_without_gets_a_note(tmp_path):
    folder = make(tmp_path / "converted")
    assert checkpoint_folders.verify_initial_checkpoint(folder) is None
    (folder / "manifest.json").unlink()
    assert checkpoint_folders.verify_initial_checkpoint(folder) == (
        f"model.checkpoint {folder} has no manifest.json: its checksums cannot be verified"
    )


def test_a_run_s_folder_is_refused_with_the_name_of_its_newest_checkpoint(tmp_path):
    for step in (8, 12):
        make(tmp_path / f"run/checkpoints/step_{step:08d}")
    for given in (tmp_path / "run", tmp_path / "run/checkpoints"):
        with refused("model.checkpoint", Cause.CONFLICT, "run/checkpoints/step_00000012"):
            checkpoint_folders.verify_initial_checkpoint(given)


@pytest.mark.parametrize("exists", [True, False])
def test_other_folders_are_refused(tmp_path, exists):
    folder = tmp_path / "other"
    if exists:
        folder.mkdir()
    with refused("model.checkpoint", Cause.NOT_FOUND, folder):
        checkpoint_folders.verify_initial_checkpoint(folder)


def test_a_wrong_one_is_refused_before_the_run_s_settings_are_written(tmp_path):
    config = Config(model={"checkpoint": str(tmp_path / "ghost")})
    with RunFolder(tmp_path / "run") as folder:
        with refused("model.checkpoint", Cause.NOT_FOUND, "ghost"):
            RunRecorder(folder, config, may_change=(), title="t")
        assert not folder.config_path.exists()
