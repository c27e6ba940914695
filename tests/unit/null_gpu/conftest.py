"""Compiles the null GPU's runtime, and runs programs on it, in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_once import made_once

from tools.null_gpu.shim.build import HEADERS_OF_TRITON, build_alone

HERE = Path(__file__).parent
TESTS = HERE.parents[1]


class Program:
    """A function of `null_programs.py` that runs in a process of its own: it prints lines of JSON,
    and goes on at a line from here where it waits for one."""

    def __init__(self, name: str, *arguments: str, **environment: str) -> None:
        command = [sys.executable, str(HERE / "null_programs.py"), name, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | environment, **pipes)

    def says(self) -> object:
        """Return what it prints next."""
        line = self.process.stdout.readline()
        assert line, f"the program ended with {self.process.wait()}"
        return json.loads(line)

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        """Return its exit status."""
        return self.process.wait()


@pytest.fixture(scope="session")
def null_gpu_library(tmp_path_factory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    if not (HEADERS_OF_TRITON / "cuda_runtime_api.h").exists():
        pytest.skip("no CUDA headers: pip install triton")
    return made_once(tmp_path_factory, "null_gpu_alone", build_alone) / "libnullgpu.so"


@pytest.fixture
def segment(tmp_path) -> Path:
    """What the programs of this test share."""
    return tmp_path / "segment"


@pytest.fixture
def start(null_gpu_library, segment) -> Iterator[Callable[..., Program]]:
    """A function that starts a program with these arguments, on null GPUs of its own for this
    test; environment: further variables."""
    started = []

    def run(name: str, *arguments: object, **environment: str) -> Program:
        variables = {
            "NULL_GPU_LIBRARY": str(null_gpu_library),
            "NULL_GPU_SEGMENT": str(segment),
            "NULL_GPUS": "4",
            "PYTHONPATH": str(TESTS),
        }
        started.append(Program(name, *map(str, arguments), **variables | environment))
        return started[-1]

    yield run
    for program in started:
        program.process.kill()
        program.process.communicate()
