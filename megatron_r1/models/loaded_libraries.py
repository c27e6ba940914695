"""The CUDA libraries that this process has loaded, with the version that each of them reports."""

import ctypes
import re
from pathlib import Path
from typing import Any

import msgspec

MAPS = Path("/proc/self/maps")


class LoadedLibrary(msgspec.Struct, frozen=True):
    """A library of this process: the file that is mapped, and the version that its code reports."""

    name: str
    version: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.file})"


def loaded_libraries(*names: str) -> list[LoadedLibrary]:
    """Return the CUDA libraries of this process, or those of these names. A library whose files are
    from two folders is in the list twice; what nothing has loaded yet is not in it."""
    lines = MAPS.read_text().splitlines()
    files = sorted({line.split(maxsplit=5)[-1] for line in lines if "/" in line}, reverse=True)
    libraries = []
    for name in names or _FUNCTIONS:
        pattern, function, *form = _FUNCTIONS[name]
        first_files = {
            file.rpartition("/")[0]: file
            for file in files
            if re.fullmatch(rf"{pattern}\.so[.\d]*", file.rpartition("/")[2])
        }
        libraries += [
            LoadedLibrary(name, _version(ctypes.CDLL(file)[function], *form), file)
            for file in reversed(first_files.values())
        ]
    return libraries


def driver_version() -> str:
    """Return the version of the installed driver, "580.95.05", as its management library says."""
    nvml, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(80)
    nvml.nvmlInit_v2()
    nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    nvml.nvmlShutdown()
    return text.value.decode()


def _version(function: Any, num_pointers: int, unit: int) -> str:
    """Ask a function that writes numbers through pointers, or returns one. A number has the major
    version times `unit`, and the others below."""
    written = [ctypes.c_int() for _ in range(num_pointers)]
    returned = function(*map(ctypes.byref, written))
    numbers = [number.value for number in written] or [returned]
    if unit:
        part = unit // 100
        numbers = [numbers[0] // unit, numbers[0] // part % 100, numbers[0] % part]
    return ".".join(map(str, numbers))


_FUNCTIONS: dict[str, tuple[str, str, int, int]] = {
    # Eight files of one folder, which must be of one version.
    "cuDNN": (r"libcudnn\w*", "cudnnGetVersion", 0, 10_000),
    "NVRTC": ("libnvrtc", "nvrtcVersion", 2, 0),
    "NCCL": ("libnccl", "ncclGetVersion", 1, 10_000),
    # cublasGetVersion needs a handle; products run in this library.
    "cuBLAS": ("libcublasLt", "cublasLtGetVersion", 0, 10_000),
    "CUDA runtime": ("libcudart", "cudaRuntimeGetVersion", 1, 1000),
    "CUDA of the driver": ("libcuda", "cuDriverGetVersion", 1, 1000),
}
"""Name → the pattern of its file's name, its function, and the form of what that tells."""
