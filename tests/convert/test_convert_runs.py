"""Which checkpoint of a run is converted, and what happens where that one is damaged."""

import shutil

import pytest
import torch
from random_folder import write_folder
from small_models import MODELS

from megatron_r1.base.errors import Cause


@pytest.fixture
def run(convert, tmp_path):
    """A run's folder with the steps 2 and 4, other weights in each."""
    folder = tmp_path / "run"
    for step, scale in ((2, 1), (4, 2)):
        hf_folder = write_folder(tmp_path / f"hf{step}", MODELS["qwen-tied"], torch.float32)
        rescale(hf_folder / "model.safetensors", scale)
        assert convert("from-hf", hf_folder, folder / f"checkpoints/step_{step:08d}")[0] == 0
    return folder


def rescale(path, factor):
    from safetensors.torch import load_file, save_file

    tensors = {name: values * factor for name, values in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def flip(folder):
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)


DAMAGE = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "no metadata": (lambda folder: (folder / "metadata.json").unlink(), "metadata.json"),
    "a flipped bit": (flip, "__0_0.distcp"),
}


def test_the_newest_is_taken_and_named(convert, run, tmp_path):
    status, output = convert("to-hf", run, tmp_path / "out", "--no-check")
    assert status == 0 and f"{run}: step 4" in output, output
    assert convert("verify", tmp_path / "out", tmp_path / "hf4")[0] == 0
    executable = [file for file in (tmp_path / "out").iterdir() if file.stat().st_mode & 0o111]
    assert not executable
    status, output = convert("verify", run, tmp_path / "hf2")
    assert status == 1 and f"{run}: step 4" in output, output


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_older_one_is_not_taken_for_a_damaged_newest_but_offered(convert, run, tmp_path, kind):
    break_it, fault = DAMAGE[kind]
    break_it(run / "checkpoints/step_00000004")
    out = tmp_path / "out"
    for arguments in (
        ("to-hf", run, out, "--no-check", "--dtype", "bfloat16"),
        ("verify", run, tmp_path / "hf2"),
    ):
        shows = ("step_00000004", fault, "step 2")
        convert.refuses("checkpoint", Cause.MALFORMED, *arguments, shows=shows)
        output = convert(*arguments)[1]
        assert not list(tmp_path.glob("out*"))
        # Its last line is the command that takes the older one.
        program, verb, *older = output.strip().splitlines()[-1].split()
        assert (program, verb) == ("megatron-r1", "convert")
        assert convert(*older)[0] == 0
        shutil.rmtree(out, ignore_errors=True)


def test_with_nothing_undamaged_or_set_aside_that_is_said(convert, run, tmp_path):
    for step in (2, 4):
        flip(run / f"checkpoints/step_{step:08d}")
    arguments = ("to-hf", run, tmp_path / "out")
    convert.refuses("checkpoint", Cause.MALFORMED, *arguments, shows=("step_00000004", run))
    assert "megatron-r1 convert to-hf" not in convert(*arguments)[1], "a damaged one was offered"
    aside = run / "checkpoints/step_00000004.damaged"
    (run / "checkpoints/step_00000004").rename(aside)
    output = convert("to-hf", run, tmp_path / "out")[1]
    assert f"{run}: step 2" in output and aside.name in output, output


def test_without_a_manifest_nothing_was_verified_and_that_is_said(convert, run, tmp_path):
    checkpoint = run / "checkpoints/step_00000004"
    output = convert("to-hf", checkpoint, tmp_path / "whole", "--no-check")[1]
    assert "manifest.json" not in output
    (checkpoint / "manifest.json").unlink()
    status, output = convert("to-hf", checkpoint, tmp_path / "out", "--no-check")
    assert status == 0 and f"{checkpoint} has no manifest.json" in output, output
