"""The preflight asks each rank's libraries, and each node's compilers, on two null GPUs."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from nullgpu.conftest import TORCHRUN

SCRIPT = ["--nproc-per-node=2", "preflight_on_null_gpu.py"]
SCALES = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}


def preflight(on_null_gpu, folder: Path, other_rank: str = "none", **variables: str):
    """Return the rows by check, the ranks' facts, and what was printed."""
    arguments = [*TORCHRUN, *SCRIPT, str(folder), other_rank]
    output = on_null_gpu(*arguments, gpus=2, **variables)
    found = json.loads((folder / "found.json").read_text())
    return {row["check"]: row for row in found["findings"]}, found["ranks"], output


def test_rows_of_a_recipe_with_fp8_engines(on_null_gpu, tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    rows, ranks, output = preflight(on_null_gpu, tmp_path, **SCALES, **cache)
    assert "nothing blocks the run" in output, output[-8000:]
    packages = Path(torch.__file__).parents[1]
    wheels = {
        "cuDNN": "nvidia-cudnn-cu13",
        "NCCL": "nvidia-nccl-cu13",
        "NVRTC": "nvidia-cuda-nvrtc",
    }
    for name, wheel in wheels.items():
        for rank in ranks:
            (library,) = (each for each in rank["libraries"] if each["name"] == name)
            assert metadata.version(wheel).startswith(library["version"])
            assert packages in Path(library["file"]).parents
            assert rows[name]["measured"] == f"{library['version']}: {library['file']}"
    assert rows["attention"]["measured"] == "fused"
    assert "6 of Megatron's groups" in rows["communicators"]["measured"]
    assert list(tmp_path.glob("triton/*/_one.cubin")), "the next run does not compile it again"
    assert {"Triton", "NVRTC", "nvcc"} == set(ranks[0]["node"]["compilations"])
    assert {rows[f"compiler: {name}"]["level"] for name in ("Triton", "NVRTC", "nvcc")} == {"ok"}


def test_another_nccl_no_nvcc_and_what_a_trainer_refuses_are_named(on_null_gpu, tmp_path):
    """A trainer would not start either: the scales of FP8 training are not those of the recipe."""
    file = tmp_path / "libnccl.so.2"
    source = "int ncclGetVersion(int *version) { *version = 29999; return 0; }"
    command = ["cc", "-shared", "-xc", "-", "-o", str(file), "-Wl,-soname,libnccl.so.2"]
    subprocess.run(command, input=source, text=True, check=True)
    rows, ranks, _ = preflight(on_null_gpu, tmp_path, "1", CUDA_HOME=str(tmp_path))
    usual = metadata.version("nvidia-nccl-cu13")
    host = ranks[1]["host"]
    assert rows["NCCL"]["level"] == "block"
    installed = Path(torch.__file__).parents[1] / "nvidia/nccl/lib/libnccl.so.2"  # torch's, by path
    problem = f"2.99.99 and {usual} on {host} (rank 1: {file}, {installed}); {usual} on the others"
    assert rows["NCCL"]["problem"] == problem
    assert rows["attention"]["level"] == rows["compiler: nvcc"]["level"] == "block"
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in rows["attention"]["problem"]
    assert str(tmp_path) in rows["compiler: nvcc"]["problem"]
    assert {check for check, row in rows.items() if row["level"] == "block"} == {
        "NCCL",
        "attention",
        "compiler: nvcc",
    }
