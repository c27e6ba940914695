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
IMPORTS = [str(ROOT / folder) for folder in ("", "tests", "tests/parallel", "tests/system")]
sys.path.append(str(ROOT / "tests" / "parallel"))


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
    """A function that runs Python with these arguments on the null GPU; returns its output."""
    shim = tmp_path_factory.mktemp("null_gpu")
    build(shim)

    def run(*arguments: str) -> str:
        environment = {
            "LD_PRELOAD": f"{shim}/libnullgpu.so",
            "LD_LIBRARY_PATH": str(shim),
            "TRITON_LIBCUDA_PATH": str(shim),
            "PYTHONPATH": ":".join(IMPORTS),
            "CUDA_VISIBLE_DEVICES": "0",
        }
        return run_script(HERE, list(arguments), **environment)

    return run
