"""Permissions of what a run writes."""

import os
import subprocess
import sys
from stat import S_IMODE

import pytest

from megatron_r1.base.files import access, atomic_write
from megatron_r1.commands import cli, sft
from megatron_r1.reporting.run_folder import RunFolder

MODES = {"owner": (0o700, 0o600), "group": (0o750, 0o640), "everyone": (0o755, 0o644)}


@pytest.fixture(autouse=True)
def wide_umask():
    """Run the test as in a shell that lets everyone read, and restore the umask."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path):
    return S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("readers", MODES)
def test_files_of_this_process_and_its_children_are_the_readers(tmp_path, readers):
    access.allow_readers(readers)
    folder, file = MODES[readers]
    with RunFolder(tmp_path / "runs/mine") as run:
        assert mode(run.path) == mode(tmp_path / "runs") == folder
        run.append_metrics({"step": 1})
        assert mode(atomic_write(run.path / "deep/report.html", "text")) == file
        assert mode(run.metrics_path) == file and mode(run.path / "deep") == folder
        program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('log')"
        subprocess.run([sys.executable, "-c", program, run.path / "log"], check=True)
        assert mode(run.path / "log") == file


def test_a_folder_that_others_could_enter_is_closed(tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run/old.jsonl").write_text("of an earlier version")
    access.allow_readers("owner")
    with RunFolder(tmp_path / "run"):
        assert mode(tmp_path / "run") == 0o700
    access.allow_readers("everyone")
    with RunFolder(tmp_path / "run"):  # what its owner has closed stays closed
        assert mode(tmp_path / "run") == 0o700


@pytest.mark.parametrize("readers", MODES)
def test_an_engine_host_writes_as_the_run_s_folder_says(tmp_path, readers):
    folder, file = MODES[readers]
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(folder)
    access.allow_readers_as(tmp_path / "run")
    assert mode(atomic_write(tmp_path / "run/logs/engine.log", "log")) == file
    access.allow_readers_as(tmp_path / "not there")
    assert mode(atomic_write(tmp_path / "run/logs/other.log", "log")) == file


@pytest.mark.parametrize(
    ("options", "umask"), [([], 0o077), (["--run.readable_by", "everyone"], 0o022)]
)
def test_a_command_sets_it_before_anything_else(tmp_path, monkeypatch, options, umask):
    seen = []

    def run(config):
        seen.append(os.umask(0))
        os.umask(seen[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "run", run)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: nowhere}\nrun: {folder: runs/x}\nsft: {data: rows.jsonl}\n")
    cli.main(["sft", str(recipe), *options])
    assert seen == [umask]
