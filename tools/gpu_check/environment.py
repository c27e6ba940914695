"""Lists the GPUs, the driver and the packages of this machine."""

import subprocess
import sys
from typing import Any

from tools.bench import machine

PACKAGES = (
    *("torch", "triton", "transformer-engine", "megatron-core", "vllm", "flash-attn", "numpy"),
    *("liger-kernel", "trl", "quack-kernels"),
)
QUERY = "name,driver_version,memory.total,clocks.max.sm,mig.mode.current"


def describe() -> dict[str, Any]:
    """Return GPUs, CUDA, Python, processor and versions; entries are "unknown" where a tool or a
    module is missing."""
    import torch

    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "processor": f"{machine.processor()}, {machine.num_cores()} cores",
        "cuda": torch.version.cuda or "none: torch is a CPU build",
        "gpus": [],
        "nvidia-smi": _nvidia_smi(),
        "versions": machine.versions(PACKAGES),
    }
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"sm_{about.major}{about.minor}"
        memory = f"{about.total_memory / 2**30:.1f} GiB"
        found["gpus"].append(f"{about.name}, {capability}, {memory}")
    return found


def _nvidia_smi() -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"unknown ({error})"]
    return (done.stdout or done.stderr).strip().splitlines()
