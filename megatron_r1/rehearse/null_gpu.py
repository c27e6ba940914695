"""Rehearsals on a null GPU (docs/gpu.md): the same command again, by Python on null GPUs.

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
PACKAGES = ("transformer-engine-torch", "vllm")
PYTHON = ".venv-cuda/bin/python"
"""What `make setup-cuda` installs into."""
IS_BELOW = "NULL_GPUS"
"""The environment variable of a process on null GPUs: their number."""
PARTS_OF_GPU = 40
"""A GPU of a miniature has 2 GiB, a fortieth of an H100's memory; what CUDA contexts, communicators
and graphs take is divided likewise."""
GIB = 80 / PARTS_OF_GPU
TAKEN_MIB = {"CONTEXT": 512, "NCCL": 128, "GRAPH": 64}
"""What they take of a GPU of 80 GiB: guesses (docs/gpu.md)."""


def is_below() -> bool:
    """Return whether this process is on null GPUs."""
    return IS_BELOW in os.environ


def run_again(arguments: Sequence[str], num_gpus: int) -> int:
    """Run `megatron-r1` with `arguments` on null GPUs; return its status. Raises UserError, with
    the remedy, where the tool or the CUDA packages are missing."""
    _check_installed(arguments)
    taken = {
        f"NULL_GPU_{name}_BYTES": (mib << 20) // PARTS_OF_GPU for name, mib in TAKEN_MIB.items()
    }
    environment = os.environ | {name: str(size) for name, size in taken.items()}
    options = ["--gpus", str(num_gpus), "--gib", f"{GIB:g}"]
    command = [sys.executable, str(TOOL), *options, "-m", "megatron_r1", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def _check_installed(arguments: Sequence[str]) -> None:
    asked = f"rehearsal.on: null-gpu runs the CUDA builds of torch, {' and '.join(PACKAGES)}"
    again = f"make setup-cuda && {PYTHON} -m megatron_r1 {' '.join(arguments)}"
    if not TOOL.is_dir():
        raise UserError(
            f"{asked} with tools/null_gpu of a checkout, which {CHECKOUT} is not; in a clone of "
            f"the repository: {again}",
            key="rehearsal.on",
            cause=Cause.NOT_INSTALLED,
        )
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing or not gpu.torch_has_cuda():
        lacks = ", ".join(["torch for CUDA", *missing] if not gpu.torch_has_cuda() else missing)
        raise UserError(
            f"{asked}, and {sys.executable} has no {lacks}: {again}",
            key="rehearsal.on",
            cause=Cause.NOT_INSTALLED,
        )
    if shutil.which("cc") is None:
        raise UserError(
            f"{asked}, and a C compiler compiles the null GPU: apt-get install gcc libc6-dev",
            key="rehearsal.on",
            cause=Cause.NOT_INSTALLED,
        )


def _is_installed(distribution: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(distribution))
    return False


def num_gpus(config: Config, verb: str) -> int:
    """Return how many GPUs a miniature needs: one for each trainer rank, also of the other layout
    that it is resumed in; its engines share them where they are colocated, and divide."""
    rollout = config.rollout
    engines = rollout.engines * rollout.tensor * rollout.data * rollout.pipeline
    resumed = layout.different_layout(config.parallel)
    trainer = max(config.parallel.processes, resumed.processes)
    if verb == "sample":
        return engines
    if verb != "rl":
        return trainer
    return max(trainer, engines)
