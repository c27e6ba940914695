"""Running a script of this folder on several ranks, and transformers' answers to compare with."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_script(command: list[str], timeout_seconds: int = 600) -> str:
    """Run a script of this folder; returns its output, or fails the test with it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}")
    return done.stdout


def run_ranks(num_ranks: int, script: str, *arguments: str) -> str:
    """Run `script` under torchrun on `num_ranks` processes of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return run_script([*launcher, *address, script, *arguments])


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Path:
    """A folder with every small model in HF format and what transformers computes with it."""
    folder = tmp_path_factory.mktemp("oracle")
    run_script(["oracle.py", str(folder)])
    return folder
