"""Whether there is a GPU, asked without importing torch: for processes that only start others.

Importing torch takes such a process a second or two, during which nothing else begins. Processes
that compute ask `platform.has_gpu`.
"""

import ctypes
import functools
import importlib.util
import runpy
from pathlib import Path
from typing import Literal

DRIVER = "libcuda.so.1"


@functools.cache
def is_usable() -> bool:
    """What `torch.cuda.is_available()` says: torch is built for CUDA, and the driver shows a device
    (`CUDA_VISIBLE_DEVICES` may hide them)."""
    return _torch_has_cuda() and _count_devices() > 0


def device() -> Literal["cpu", "cuda"]:
    """What engines on this machine compute on."""
    return "cuda" if is_usable() else "cpu"


def _torch_has_cuda() -> bool:
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return False
    build = runpy.run_path(str(Path(package.origin).with_name("version.py")))
    return build["cuda"] is not None


def _count_devices() -> int:
    """CUDA driver API, cuInit and cuDeviceGetCount; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
