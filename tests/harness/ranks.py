"""Running a test's script as a process of its own, or as several ranks."""

import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessException, start_processes

from megatron_r1.base.processes.children import free_port, rank_variables

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run_script(folder: Path, command: list[str], **environment) -> str:
    """Run `command` in Python from `folder`; returns its output, or fails the test with it."""
    process = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        pytest.fail(
            f"{' '.join(command)} ended with {process.returncode}:\n{process.stdout[-8000:]}"
        )
    return process.stdout


def run_under_torchrun(folder: Path, world_size: int, script: str, *arguments: str) -> str:
    """Run `script` of `folder` under torchrun on `world_size` processes of this machine."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port('127.0.0.1')}"]
    with tempfile.TemporaryDirectory() as logs:  # torchrun leaves a folder for them behind
        command = [*launcher, *address, f"--log-dir={logs}", script, *arguments]
        return run_script(folder, command)


def run_ranks(folder: Path, world_size: int, script: str, *arguments: str) -> str:
    """Run `script` of `folder` with torchrun's variables in `world_size` processes; returns their
    output, or fails the test with it.

    The ranks are forked from a server that has imported Megatron. The import would take each of
    them 4 seconds of CPU, longer than most of the scripts compute."""
    _start_fork_server()
    with tempfile.NamedTemporaryFile() as log:
        rank_arguments = (
            world_size,
            free_port("127.0.0.1"),
            folder,
            [script, *arguments],
            log.name,
        )
        ranks = start_processes(
            _run_rank, rank_arguments, world_size, join=False, start_method="forkserver"
        )
        error = None
        try:
            while not ranks.join():
                pass
        except ProcessException as failure:
            error = str(failure)
        finally:
            for process in ranks.processes:
                process.kill()
        output = Path(log.name).read_text()
    if error is not None:
        pytest.fail(f"{script} {' '.join(arguments)}: {error}\n{output[-8000:]}")
    return output


def _start_fork_server() -> None:
    forkserver.set_forkserver_preload(["imported_megatron"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():  # OpenMP reads its own when it is loaded
            patch.setenv(name, value)
        forkserver.ensure_running()


def _run_rank(
    rank: int, world_size: int, port: int, folder: Path, command: list[str], log: str
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= rank_variables(rank, world_size, port)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = command
    try:
        runpy.run_path(str(folder / command[0]), run_name="__main__")
    finally:
        sys.stdout.flush()
