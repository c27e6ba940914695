"""Starts Python with the null GPU below it: the environment of such a process, and its libraries.

    python tools/null_gpu [--gpus N] [--gib N] PYTHON_ARGUMENTS

torch's operators, Transformer Engine's kernels and those of vLLM that `vllm_on_host` knows compute
on the host, in the process and in all that it starts."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil

from tools.null_gpu.segment_records import held_bytes
from tools.null_gpu.shim.build import HERE as SHIM
from tools.null_gpu.wait_graph import find_stuck

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
GIB = 2**30
STUCK_SECONDS = 30.0
"""How long calls must wait for each other before they are named."""
LOOKS_APART = 5
"""Of so many looks at a GPU's memory one is at the host's and at what waits: these take ten times
as long, of cores that compute."""
PACKAGES = ("torch", "transformer-engine-torch", "vllm")
"""Packages whose CUDA builds run on the null GPU: the libraries depend on their versions."""
ON_HOST = {
    # Triton's kernels run in its interpreter, what torch.compile would compile as it is.
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # Only NCCL moves data between GPUs; samplers are torch's.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Its products are torch's, so that no kernels need to be compiled for all sizes.
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    # vLLM is imported once for all processes of an engine: most of the time of a small one. No
    # process may ask the CUDA runtime for GPUs before.
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Variables of processes in which kernels compute on the host."""


def environment(
    libraries: Path, gpus: int, *, computes: bool, device: str = "h200"
) -> dict[str, str]:
    """Return the variables of a process on `gpus` null GPUs.

    Args:
        libraries: the folder into which `shim.build` has written the libraries.
        gpus: the number of null GPUs.
        computes: whether kernels compute on the host, in this process and in all it starts.
        device: the file of `shim/devices` with the properties for which cuDNN answers."""
    library = f"{libraries}/libnullgpu.so"
    properties = SHIM / "devices" / f"{device}.json"
    imports = [ROOT, ROOT / "kernels", ROOT / "grading", HERE]
    variables = {
        "NULL_GPUS": str(gpus),
        "LD_PRELOAD": library,
        "LD_LIBRARY_PATH": str(libraries),
        "NULL_GPU_PROPERTIES": str(properties),
        "NULL_GPU_ARCHITECTURE": str(json.loads(properties.read_text())["deviceVer"] // 10),
        # cuDNN's frontend in Transformer Engine calls the runtime in the library that it opens.
        "CUDNN_FRONTEND_CUDART_LIB_NAME": library,
        "TRITON_LIBCUDA_PATH": str(libraries),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
    }
    if computes:
        imports.insert(0, HERE / "everywhere")
        variables |= ON_HOST | {"VLLM_NCCL_SO_PATH": library}
    return variables | {"PYTHONPATH": ":".join(map(str, imports))}


def libraries() -> Path:
    """Return the folder of the libraries for the installed packages, which are compiled there the
    first time: build/null_gpu."""
    from tools.null_gpu.shim.build import build

    digest = hashlib.blake2b(digest_size=8)
    for name in PACKAGES:
        digest.update(f"{name} {metadata.version(name)}\n".encode())
    for file in sorted(SHIM.iterdir()):
        if file.is_file():
            digest.update(file.read_bytes())
    folder = ROOT / "build" / "null_gpu" / digest.hexdigest()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        new_folder = Path(tempfile.mkdtemp(dir=folder.parent))
        build(new_folder)
        try:
            new_folder.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(new_folder)
    return folder


def main(arguments: list[str]) -> int:
    """Run Python on null GPUs and return its status. At the end the most bytes that were held of
    a GPU and by all processes in the host's memory are printed; calls of NCCL that wait for each
    other, or for ended ranks, for `STUCK_SECONDS` are named as soon as that."""
    parser = argparse.ArgumentParser(
        prog="tools/null_gpu",
        usage="%(prog)s [--gpus N] [--gib N] PYTHON_ARGUMENTS",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gib", type=float, default=80.0, help="memory of a GPU")
    options, python = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="null_gpu_") as folder:
        segment = Path(folder) / "segment"
        variables = environment(libraries(), options.gpus, computes=True)
        variables["NULL_GPU_SEGMENT"] = str(segment)
        variables["NULL_GPU_BYTES"] = str(int(options.gib * GIB))
        process = subprocess.Popen([sys.executable, *python], env=os.environ | variables)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: process.send_signal(number))
        watched = Watched(segment)
        while process.poll() is None:
            watched.look(process.pid)
            time.sleep(1)
        print(watched.summary(options.gib), flush=True)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode


class Watched:
    """What processes on null GPUs have held, and whether they wait for each other."""

    def __init__(self, segment: Path) -> None:
        self.segment = segment
        self.of_gpu: dict[int, int] = {}
        self.of_host = 0
        self.stuck: tuple[str, float] | None = None
        self._looks = 0

    def look(self, pid: int) -> None:
        """Note what the process `pid` and all that it has started hold now."""
        by_process = held_bytes(self.segment).values()
        for number, sizes in enumerate(zip(*by_process, strict=True)):
            self.of_gpu[number] = max(self.of_gpu.get(number, 0), sum(sizes))
        self._looks += 1
        if self._looks % LOOKS_APART != 1:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            self.of_host = max(self.of_host, sum(map(_memory_bytes, [root, *root.children(True)])))
        report = find_stuck(self.segment)
        if report is None or self.stuck is None or report != self.stuck[0]:
            self.stuck = (report, time.monotonic()) if report else None
        elif 0 < self.stuck[1] < time.monotonic() - STUCK_SECONDS:
            print(report, file=sys.stderr, flush=True)
            self.stuck = report, 0.0  # named

    def summary(self, gib: float) -> str:
        """Return the most that was held."""
        number = max(self.of_gpu, key=lambda gpu: self.of_gpu[gpu], default=0)
        max_gib = self.of_gpu.get(number, 0) / GIB
        return (
            f"null GPU: at most {max_gib:.2f} of {gib:g} GiB of a GPU (GPU {number}), "
            f"{self.of_host / GIB:.1f} GiB of the host's memory"
        )


def _memory_bytes(process: psutil.Process) -> int:
    """Return the bytes of a process that it shares with none, and its part of the others."""
    with contextlib.suppress(psutil.Error):
        return process.memory_full_info().pss
    return 0
