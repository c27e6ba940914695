"""A node as its ranks find it: versions, memory, sandbox."""

import contextlib
import hashlib
import os
import platform as system
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch
from r1_grading.sandbox import require_sandbox

import megatron_r1
from megatron_r1.base.errors import UserError
from megatron_r1.evaluation.identity import versions as package_versions
from megatron_r1.models import platform
from megatron_r1.rehearse.preflight.facts import MemoryUsage

GPU_PACKAGES = ("transformer-engine", "flash-attn", "triton", "deep-ep", "apex")
DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """Return what must be equal on all nodes: packages, this program's source, CUDA, NCCL, driver,
    GPU; and the kernel, which may differ."""
    version_by_name = package_versions()
    for package in GPU_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version_by_name[package] = metadata.version(package)
    version_by_name["source of megatron_r1"] = _digest(Path(megatron_r1.__file__).parent)
    version_by_name["kernel"] = system.release()
    if platform.has_gpu():
        version_by_name["CUDA"] = str(torch.version.cuda)
        version_by_name["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        version_by_name["GPU"] = torch.cuda.get_device_name()
        if DRIVER_VERSION_FILE.exists():
            version_by_name["driver"] = (
                DRIVER_VERSION_FILE.read_text().splitlines()[0].split("  ")[1].strip()
            )
    return version_by_name


def host_memory() -> MemoryUsage:
    """Return this host's memory, with its three largest processes of others than this job."""
    memory = psutil.virtual_memory()
    session = os.getsid(0)
    other_processes = []
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) != session and process.info["memory_info"]:
                other_processes.append((process.info["memory_info"].rss, process.info))
    other_processes.sort(key=lambda process_memory: process_memory[0], reverse=True)
    holders = [
        f"{info['name']} ({info['pid']}): {rss / 2**30:.1f} GiB"
        for rss, info in other_processes[:3]
    ]
    return MemoryUsage(memory.total, memory.available, holders)


def device_memory(gpu: int) -> MemoryUsage | None:
    """Return the memory of a GPU with the processes that hold some; None without a GPU."""
    if not platform.has_gpu():
        return None
    free, total = torch.cuda.mem_get_info(gpu)
    return MemoryUsage(total, free, _gpu_holders(gpu))


def sandbox_problem() -> str:
    """Return why programs cannot be graded on this node, or ""."""
    try:
        require_sandbox("python")
    except UserError as error:
        return str(error)
    return ""


def _digest(package: Path) -> str:
    """Return a digest of all source files: a version number stays the same between commits."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def _gpu_holders(gpu: int) -> list[str]:
    uuid = f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-compute-apps=pid,used_memory"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        process = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        lines = process.stdout.strip().splitlines() if process.returncode == 0 else []
        return [line for line in lines if line.split(",")[0] != str(os.getpid())]
    return []
