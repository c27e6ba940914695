"""Builds the null GPU and runs scripts on it; skips where the CUDA packages are not installed."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from nullgpu.shim.build import build
from ranks import run_script

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = ("", "kernels", "tests", "tests/parallel", "tests/system", "tests/nullgpu")
IMPORTS = [str(ROOT / folder) for folder in FOLDERS]
sys.path.append(str(ROOT / "tests" / "parallel"))
TORCHRUN = ["-m", "torch.distributed.run", "--master-addr=127.0.0.1", "--standalone"]


def pytest_collection_modifyitems(items):
    packages = {package.name for package in metadata.distributions()}
    if torch.version.cuda and {"transformer_engine_torch", "vllm"} <= packages:
        return
    skipped = pytest.mark.skip(reason="run by `make test-cuda`, with the CUDA packages")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skipped)


@pytest.fixture(scope="session")
def on_null_gpu(tmp_path_factory) -> Callable[..., str]:
    """A function that runs Python with these arguments on the null GPU, or on several; returns its
    output. computes: whether torch's operators compute in every process from the beginning."""
    shim = tmp_path_factory.mktemp("null_gpu")
    build(shim)

    def run(*arguments: str, gpus: int = 1, computes: bool = False) -> str:
        imports = [str(HERE / "everywhere"), *IMPORTS] if computes else IMPORTS
        environment = {
            "NULL_GPUS": str(gpus),
            "LD_PRELOAD": f"{shim}/libnullgpu.so",
            "LD_LIBRARY_PATH": str(shim),
            "TRITON_LIBCUDA_PATH": str(shim),
            "NULL_GPU_MEMORY": f"{shim}/memory",
            "PYTHONPATH": ":".join(imports),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
        }
        return run_script(HERE, list(arguments), **environment)

    return run
