"""The same command under torchrun: its processes are the ranks, rank 0 starts the controller."""

import json
import subprocess
import sys
import tempfile

import pytest
from command_line import environment

from megatron_r1.reporting.run_folder import RunFolder

pytestmark = pytest.mark.more


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = environment() | {"OMP_NUM_THREADS": "1"}
    del env["PYTHONWARNINGS"]
    with tempfile.TemporaryDirectory(prefix="t") as logs:  # torchrun leaves a folder behind
        return subprocess.run(
            [*launcher, f"--log-dir={logs}", "-m", "megatron_r1", *map(str, arguments)],
            env=env,
            capture_output=True,
            text=True,
        )


@pytest.mark.slow  # the ranks' losses: tests/parallel/test_trainer.py; torchrun's ranks: the next
def test_torchrun_trains_tensor_parallel_what_one_process_trains(base, tmp_path):
    settings = ["--run.folder", tmp_path / "run", "--parallel.tensor", "2"]
    done = torchrun("sft", base / "sft.yaml", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    split, single = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", base / "base")
    )
    assert [m["step"] for m in split] == [m["step"] for m in single] == [1, 2, 3, 4]
    for a, b in zip(split, single, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3


def test_torchrun_gives_the_number_of_ranks_that_rl_pushes_from(base, tmp_path):
    # The recipe leaves parallel.processes at 1.
    settings = {"run.folder": tmp_path / "run", "run.steps": 1, "parallel.tensor": 2}
    settings |= {"rollout.max_response_tokens": 8, "eval.samples": 1, "rl.schedule": "[]"}
    done = torchrun(
        "rl", base / "rl.yaml", *(f"--{key}={value}" for key, value in settings.items())
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["push/probe_diff"] < 1e-3


def test_a_controller_that_ends_before_it_listens_ends_all_ranks(base):
    finished = torchrun("sft", base / "sft.yaml", "--parallel.tensor", "2")
    assert finished.returncode == 0 and "already finished" in finished.stdout, finished.stderr


@pytest.mark.slow
def test_a_run_in_use_ends_all_ranks(base, tmp_path):
    with RunFolder(tmp_path / "run"):
        settings = ["--run.folder", tmp_path / "run", "--parallel.tensor", "2"]
        locked = torchrun("sft", base / "sft.yaml", *settings)
    assert locked.returncode != 0
    assert "is in use by another run" in locked.stderr + locked.stdout


def test_a_mistake_under_torchrun_is_told_and_ends_all_ranks(base, tmp_path):
    settings = ["--run.folder", tmp_path / "run", "--parallel.tensor", "4"]
    done = torchrun("sft", base / "sft.yaml", *settings)
    assert done.returncode != 0
    assert "2 trainer ranks cannot be divided into groups of 4" in done.stderr + done.stdout
