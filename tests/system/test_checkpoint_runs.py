"""Supervised runs of the command line whose checkpoints go wrong, with two trainer processes."""

import json
import resource
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from command_line import command, environment, run
from run_progress import left_behind
from safetensors.torch import load_file
from waiting import wait_until

from megatron_r1.base.processes.fork_server import SERVERS

pytestmark = pytest.mark.more

TWO = ["--parallel.processes", "2", "--parallel.tensor", "2"]
SMALL_DISK = 60_000  # bytes that a file may have: enough for metrics, too few for weights


def settings(folder: Path, steps: int, *more: str) -> list[str]:
    return ["--run.folder", str(folder), "--run.steps", str(steps), *TWO, *more]


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def uninterrupted(base) -> Path:
    folder = base / "uninterrupted"
    done = run("sft", base / "sft.yaml", *settings(folder, 6))
    assert done.returncode == 0, done.stderr
    return folder


def test_checkpoints_are_measured_and_the_newest_kept(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").open()]
    reports = [line for line in lines if "checkpoint/step" in line]
    assert reports and all(line["checkpoint/step"] < line["step"] for line in reports)
    for line in reports:
        assert line["checkpoint/seconds_blocked"] > 0 and line["checkpoint/seconds"] > 0
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006"]


def test_kill_9_in_the_middle_of_a_write_costs_steps_and_changes_nothing(base, uninterrupted):
    folder = base / "interrupted"
    arguments = command("sft", base / "sft.yaml", *settings(folder, 6))
    process = subprocess.Popen(arguments, env=environment(), start_new_session=True)
    partial_folder = folder / "checkpoints/.step_00000003.partial"
    while not partial_folder.exists():
        assert process.poll() is None, "it ended without a third checkpoint"
        time.sleep(0.0005)
    process.kill()
    process.wait()
    wait_until(lambda: not left_behind(folder))
    assert (folder / "checkpoints/step_00000002/manifest.json").is_file()
    came_too_late = (folder / "checkpoints/step_00000003").is_dir()

    done = run("sft", base / "sft.yaml", *settings(folder, 6))
    assert done.returncode == 0, done.stderr
    removed = "step_00000003 was still being written when the run ended" in done.stdout
    assert removed != came_too_late
    assert f"continuing after step {3 if came_too_late else 2}" in done.stdout
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6]
    expected = load_file(uninterrupted / "hf/model.safetensors")
    for name, tensor in load_file(folder / "hf/model.safetensors").items():
        assert tensor.equal(expected[name]), f"{name} differs from the uninterrupted run's"


def copy(uninterrupted: Path, folder: Path) -> Path:
    """As a person copies it: its config.yaml names the folder it was started in."""
    shutil.copytree(uninterrupted, folder)
    return folder


def flip(folder: Path) -> None:
    path = next(folder.glob("__1_*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_named_and_the_run_goes_on_from_the_one_before(
    base, uninterrupted, tmp_path
):
    folder = copy(uninterrupted, tmp_path / "run")
    flip(folder / "checkpoints/step_00000006")
    done = run("sft", base / "sft.yaml", *settings(folder, 7))
    assert done.returncode == 0, done.stderr
    assert "DAMAGED checkpoint, not used: step_00000006: __1_" in done.stdout
    assert "continuing from step_00000005 instead" in done.stdout
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6, 7]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_00000006", "step_00000006.damaged", "step_00000007"]


@pytest.mark.more
def test_with_every_checkpoint_damaged_the_run_refuses_and_keeps_its_metrics(
    base, uninterrupted, tmp_path
):
    folder = copy(uninterrupted, tmp_path / "run")
    for checkpoint in (folder / "checkpoints").iterdir():
        flip(checkpoint)
    done = run("sft", base / "sft.yaml", *settings(folder, 7))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "has no checkpoint left that can be used" in done.stderr
    assert "step_00000006: __1_" in done.stderr and "step_00000005: __1_" in done.stderr
    assert "Put a good copy of one there" in done.stderr
    # What came after the last checkpoint that was tried is cut off; nothing else is.
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_00000005",
        "step_00000006",
    ]


@pytest.mark.slow  # of one rank: tests/parallel/test_checkpoints.py
def test_a_full_disk_stops_the_run_with_one_sentence_and_room_lets_it_go_on(base, tmp_path):
    folder = tmp_path / "run"
    arguments = command("sft", base / "sft.yaml", *settings(folder, 4, "--checkpoint.every", "2"))
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (SMALL_DISK, SMALL_DISK))
    env = environment() | {SERVERS: ""}  # a process inherits the limits of its fork server
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "step_00000002 could not be written (rank 0: [Errno 27] File too large" in done.stderr
    assert "make room" in done.stderr and list((folder / "checkpoints").iterdir()) == []
    assert steps_of(folder)[-1] in (2, 3), "it must stop at the next step"
    done = run("sft", base / "sft.yaml", *settings(folder, 4, "--checkpoint.every", "2"))
    assert done.returncode == 0 and steps_of(folder) == [1, 2, 3, 4]
