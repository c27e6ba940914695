"""The GPUs of this host, found without importing torch: for processes that only start others.

Importing torch takes such a process a second or two, during which nothing else begins. Processes
that compute call `platform.has_gpu`."""

import ctypes
import functools
import glob
import importlib.util
import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_r1.engines.server.errors import EngineError

DRIVER_LIBRARY = "libcuda.so.1"


@functools.cache
def is_usable() -> bool:
    """Return what `torch.cuda.is_available()` would: torch is built for CUDA, and the driver shows
    a device (`CUDA_VISIBLE_DEVICES` may hide them)."""
    return torch_has_cuda() and _count_devices() > 0


@functools.cache
def architecture() -> int | None:
    """Return the first number of the first GPU's compute capability; None without a GPU. NVML is
    asked, as the driver may read its environment when it is first called."""
    major, minor, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return major.value


def engine_device() -> Literal["cpu", "cuda"]:
    """Return the device that engines on this host compute on."""
    return "cuda" if is_usable() else "cpu"


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs in CUDA_VISIBLE_DEVICES, which Slurm sets; where it is not set, all."""
    visible_ids = environment.get("CUDA_VISIBLE_DEVICES")
    if visible_ids is not None:
        return [gpu for gpu in visible_ids.split(",") if gpu]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def gpus_of_slot(visible: list[str], num_engines: int, slot: int, key: str) -> dict[str, str]:
    """Return the environment variable that gives one of several engines its equal share of GPUs.

    Args:
        visible: the GPUs to divide, as in CUDA_VISIBLE_DEVICES.
        num_engines: the engines that share them.
        slot: which of these engines, from 0.
        key: the setting of `num_engines`, for the error.

    Raises:
        EngineError: the GPUs cannot be divided equally."""
    if not visible or len(visible) % num_engines:
        raise EngineError(
            f"{len(visible)} GPUs ({','.join(visible) or 'none visible'}) cannot be divided among "
            f"{num_engines} engines; set {key} to a divisor, or CUDA_VISIBLE_DEVICES to a multiple"
        )
    share = len(visible) // num_engines
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot * share : (slot + 1) * share])}


def with_gpu_share(
    settings: dict[str, Any], index: int, num_engines: int, key: str = "rollout.engines"
) -> dict[str, Any]:
    """Return the settings of one of several engines that share this host's GPUs equally.

    Args:
        settings: the settings of all.
        index: the engine.
        num_engines: how many share the GPUs.
        key: the setting that errors name.

    Raises:
        EngineError: the GPUs of this host cannot be divided equally.
    """
    if num_engines == 1 or settings.get("device") != "cuda":
        return settings
    gpus = gpus_of_slot(visible_gpus(os.environ), num_engines, index % num_engines, key)
    return settings | {"extra_env": gpus | dict(settings.get("extra_env") or {})}


def torch_has_cuda() -> bool:
    """Return whether the installed torch is built for CUDA."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return False
    version_values = runpy.run_path(str(Path(package.origin).with_name("version.py")))
    return version_values["cuda"] is not None


def _count_devices() -> int:
    """Call the CUDA driver's cuInit and cuDeviceGetCount; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
