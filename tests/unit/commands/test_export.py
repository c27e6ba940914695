"""Which export of a run is its newest, and of which checkpoint an exported folder is."""

import asyncio
import os

import pytest

from megatron_r1.commands.parts import checkpoint_export
from megatron_r1.config import Config, ParallelConfig, dump_recipe
from megatron_r1.evaluation.model_folder import find_model
from megatron_r1.trainer.checkpoints import manifest
from megatron_r1.trainer.operations import CheckpointOperations


def checkpoint(folder, step, content):
    made = folder / f"checkpoints/step_{step:08d}"
    made.mkdir(parents=True)
    (made / "weights").write_text(content)
    manifest.write_manifest(made)
    return made


def test_a_run_that_went_on_after_its_export_has_to_be_exported_again(tmp_path):
    """Killed between its last checkpoint and its export, it still has the one before."""
    older = checkpoint(tmp_path, 4, "a")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    os.utime(older, (1, 1))
    assert find_model(str(tmp_path)) == (tmp_path / "hf", False)
    newer = checkpoint(tmp_path, 6, "b")
    os.utime(tmp_path / "hf/config.json", (2, 2))
    assert find_model(str(tmp_path)) == (newer, True)


class Trainer:
    """Exports the content of the checkpoint it was given."""

    def __init__(self, config, logs):
        pass

    def launch(self):
        pass

    async def connect(self):
        pass

    async def close(self):
        pass

    async def call(self, operation, folder, **arguments):
        if operation == CheckpointOperations.load_checkpoint:
            self.checkpoint = checkpoint_export.Path(folder)
            return
        checkpoint_export.Path(folder).mkdir()
        (checkpoint_export.Path(folder) / "config.json").write_text("{}")
        (checkpoint_export.Path(folder) / "weights").write_text(
            (self.checkpoint / "weights").read_text()
        )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_export, "TrainerClient", Trainer)
    for name in "ab":
        checkpoint(tmp_path / name, 100, name)
        (tmp_path / name / "config.yaml").write_text(dump_recipe(Config()))
    return tmp_path


def test_an_export_is_used_again_for_the_same_checkpoint_only(runs):
    target = runs / "eval/hf_step_00000100"

    def exported(name):
        made = runs / name / "checkpoints/step_00000100"
        asyncio.run(checkpoint_export.export_checkpoint(made, target, ParallelConfig(), runs))
        return (target / "weights").read_text()

    (runs / "eval").mkdir()
    assert exported("a") == "a"
    first = (target / "weights").stat().st_ino
    assert exported("a") == "a" and (target / "weights").stat().st_ino == first
    assert exported("b") == "b"


def test_a_checkpoint_may_be_named_from_its_parent_folder(runs, monkeypatch):
    monkeypatch.chdir(runs / "a/checkpoints")
    made = checkpoint_export.Path("step_00000100")
    asyncio.run(checkpoint_export.export_checkpoint(made, runs / "hf", ParallelConfig(), runs))
    assert (runs / "hf/weights").read_text() == "a"
