"""Builds the null GPU and runs scripts on it; deselects these tests where the CUDA packages are
missing, which `make setup-cuda` installs."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from ranks import run_script

from tools.null_gpu.launch import environment
from tools.null_gpu.shim.build import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = ("", "kernels", "tests", "tests/parallel", "tests/system", "tests/nullgpu")
IMPORTS = [str(ROOT / folder) for folder in FOLDERS]
sys.path.append(str(ROOT / "tests" / "parallel"))
TORCHRUN = ["-m", "torch.distributed.run", "--master-addr=127.0.0.1", "--standalone"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    packages = {package.name for package in metadata.distributions()}
    if torch.version.cuda and {"transformer_engine_torch", "vllm"} <= packages:
        return
    on_null_gpu = [item for item in items if HERE in item.path.parents]
    config.hook.pytest_deselected(items=on_null_gpu)
    items[:] = [item for item in items if HERE not in item.path.parents]


@pytest.fixture(scope="session")
def on_null_gpu(tmp_path_factory) -> Callable[..., str]:
    """A function that runs Python on the null GPU, or on several, and returns its output.

    computes: whether torch's operators compute in every process from the beginning; device: for
    which cuDNN answers; preload: a library in front of all others; settings: further variables of
    the environment."""
    shim = tmp_path_factory.mktemp("null_gpu")
    build(shim)

    def run(
        *arguments: str,
        gpus: int = 1,
        computes: bool = False,
        device: str = "h200",
        preload: str | Path = "",
        **settings: str,
    ) -> str:
        variables = environment(shim, gpus, computes=computes, device=device)
        variables["PYTHONPATH"] = ":".join([variables["PYTHONPATH"], *IMPORTS])
        variables["LD_PRELOAD"] = f"{preload} {variables['LD_PRELOAD']}".strip()
        variables["NULL_GPU_SEGMENT"] = f"{shim}/segment"
        return run_script(HERE, list(arguments), **variables | settings)

    return run
