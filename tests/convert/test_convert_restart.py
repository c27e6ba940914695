import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_folder import write_folder
from small_models import MODELS

from megatron_r1.base.errors import Cause
from megatron_r1.commands.convert import from_hf
from megatron_r1.trainer.checkpoints import manifest

ROOT = Path(__file__).parents[2]


def run_killed(count, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.convert.killed_convert", str(count), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def marks(folder, pattern):
    """Of every finished file: what changes when somebody writes it again."""
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.glob(pattern)}


@pytest.mark.more
@pytest.mark.parametrize("verb", ["from-hf", "to-hf"])
def test_a_killed_conversion_is_continued_by_the_same_command(convert, tmp_path, monkeypatch, verb):
    source = write_folder(tmp_path / "hf", MODELS["deepseek-yarn-mtp"], torch.bfloat16)
    pattern, options = "__*.distcp", ()
    if verb == "to-hf":
        assert convert("from-hf", source, tmp_path / "megatron")[0] == 0
        source, pattern = tmp_path / "megatron", "model-*.safetensors"
        options = ("--max-file-bytes", 60_000, "--no-check")
    whole, out = tmp_path / "whole", tmp_path / "out"
    monkeypatch.setattr(from_hf, "FILE_BYTES", 60_000)  # as the killed one has it
    assert convert(verb, source, whole, *options)[0] == 0

    done = run_killed(100, verb, source, out, *options)
    assert done.returncode == -9, done.stderr
    unfinished = tmp_path / "out.incomplete"
    assert not out.exists()
    before = marks(unfinished, pattern)
    files = sorted(f.name for f in whole.glob(pattern))
    assert 1 < len(before) < len(files), (len(before), len(files))
    assert len(list(unfinished.glob(".*.tmp"))) == 1, "killed inside a file"

    assert convert(verb, source, out, *options)[0] == 0
    assert not unfinished.exists()
    after = marks(out, pattern)
    assert {name: after[name] for name in before} == before, "a finished file was written again"
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.iterdir())
    assert all((out / n).read_bytes() == (whole / n).read_bytes() for n in files)
    if verb == "from-hf":
        assert manifest.manifest_faults(out, "full") == []
    assert convert("verify", source, out)[0] == 0


@pytest.mark.more
def test_an_interrupted_conversion_is_not_mixed_with_another(convert, tmp_path):
    source = write_folder(tmp_path / "hf", MODELS["llama3"], torch.float32)
    out = tmp_path / "out"
    assert run_killed(20, "from-hf", source, out).returncode == -9
    changed = "out", Cause.CHANGED, "from-hf", source, out
    convert.refuses(*changed, "--dtype", "bfloat16", shows=("dtype", "float32", "bfloat16"))
    os.utime(source / "model.safetensors")
    convert.refuses(*changed)


@pytest.mark.slow
def test_several_processes_write_the_same_files(tmp_path):
    source = write_folder(tmp_path / "hf", MODELS["deepseek-yarn-mtp"], torch.bfloat16)
    tool = str(ROOT / "tools" / "convert")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, tool, *map(str, arguments)]
        subprocess.run(command, check=True, env=environment, capture_output=True)

    run("from-hf", source, tmp_path / "megatron")
    small = ("--max-file-bytes", 60_000, "--no-check")
    run("to-hf", tmp_path / "megatron", tmp_path / "one", *small)
    run("to-hf", tmp_path / "megatron", tmp_path / "two", *small, "--workers", 2)
    run("verify", tmp_path / "one", tmp_path / "two", "--workers", 2)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
