"""The rehearsal of a command, run again on null GPUs (docs/gpu.md).

There the CUDA builds of torch, Transformer Engine and vLLM run, NCCL's calls and the GPU's memory
are imitated, and kernels compute by operators of the host. It is a tool of the checkout, which the
wheel does not have; this module finds it and starts it."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import megatron_r1
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.engines.server import gpu
from megatron_r1.rehearse import layout

CHECKOUT = Path(megatron_r1.__file__).resolve().parents[1]
TOOL = CHECKOUT / "tools" / "null_gpu"
CUDA_PACKAGES = ("transformer-engine-torch", "vllm")
CUDA_PYTHON = ".venv-cuda/bin/python"
"""What `make setup-cuda` installs into."""
IS_ON_NULL_GPU = "NULL_GPUS"
"""The environment variable of a process on null GPUs: their number."""
PARTS_OF_GPU = 40
"""A GPU of a miniature has 2 GiB, a fortieth of an H100's memory; what CUDA contexts, communicators
and graphs take is divided by as much."""
NULL_GPU_GIB = 80 / PARTS_OF_GPU
RUNTIME_MIB = {"CONTEXT": 512, "NCCL": 128, "GRAPH": 64}
"""What they take of a GPU of 80 GiB: guesses (docs/gpu.md)."""


def is_on_null_gpu() -> bool:
    """Return whether this process is on null GPUs."""
    return IS_ON_NULL_GPU in os.environ


def run_on_null_gpu(arguments: Sequence[str], num_gpus: int) -> int:
    """Run `megatron-r1` with `arguments` on null GPUs; return its status.

    Raises:
        UserError: the tool or the CUDA packages are missing; it has the remedy.
    """
    _check_installed(arguments)
    reserved_bytes = {
        f"NULL_GPU_{name}_BYTES": (mib << 20) // PARTS_OF_GPU for name, mib in RUNTIME_MIB.items()
    }
    environment = os.environ | {name: str(size) for name, size in reserved_bytes.items()}
    options = ["--gpus", str(num_gpus), "--gib", f"{NULL_GPU_GIB:g}"]
    command = [sys.executable, str(TOOL), *options, "-m", "megatron_r1", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def num_null_gpus(config: Config, verb: str) -> int:
    """Return how many GPUs a miniature needs: one for each trainer rank, also of the other layout
    that it is resumed in. Engines divide them where they are colocated, or else have others."""
    rollout = config.rollout
    engines = (
        rollout.engines
        * rollout.tensor_parallel
        * rollout.data_parallel
        * rollout.pipeline_parallel
    )
    fewer = rollout.model_copy(update=layout.fewer_engine_ranks(rollout))
    engines = max(
        engines,
        fewer.engines * fewer.tensor_parallel * fewer.data_parallel * fewer.pipeline_parallel,
    )
    resumed = layout.different_layout(config.parallel)
    trainer = max(config.parallel.processes, resumed.processes)
    if verb == "sample":
        return engines
    if verb != "rl":
        return trainer
    return max(trainer, engines) if rollout.colocated else trainer + engines


def _check_installed(arguments: Sequence[str]) -> None:
    premise = f"rehearsal.on: null-gpu runs the CUDA builds of torch, {' and '.join(CUDA_PACKAGES)}"
    command = f"make setup-cuda && {CUDA_PYTHON} -m megatron_r1 {' '.join(arguments)}"
    if not TOOL.is_dir():
        raise UserError(
            f"{premise} with tools/null_gpu of a checkout, which {CHECKOUT} is not; in a clone of "
            f"the repository: {command}",
            key="rehearsal.on",
            cause=Cause.NOT_INSTALLED,
        )
    missing = [name for name in CUDA_PACKAGES if not _is_installed(name)]
    if missing or not gpu.torch_has_cuda():
        lacks = ", ".join(["torch for CUDA", *missing] if not gpu.torch_has_cuda() else missing)
        raise UserError(
            f"{premise}, and {sys.executable} has no {lacks}: {command}",
            key="rehearsal.on",
            cause=Cause.NOT_INSTALLED,
        )
    if shutil.which("cc") is None:
        raise UserError(
            f"{premise}, and a C compiler compiles the null GPU: apt-get install gcc libc6-dev",
            key="rehearsal.on",
            cause=Cause.NOT_INSTALLED,
        )


def _is_installed(distribution: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(distribution))
    return False
