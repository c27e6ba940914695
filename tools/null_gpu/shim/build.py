"""Compiles the null GPU: `python build.py FOLDER` writes its three libraries there.

    libnullgpu.so       preloaded: CUDA's runtime (runtime.c, streams.c, events.c, memory.c,
                        copies.c), NCCL (communicators.c, calls.c, numbers.c), cuBLAS and NVRTC
                        (libraries.c), questions to cuDNN (cudnn.c), what processes share and count
                        (segment.c, counters.c)
    libcuda.so.1        in the place of the driver (driver.c)
    libnvidia-ml.so.1   in the place of the driver's management library (nvml.c)

Only what returns something is written by hand. All other functions that the installed extensions
of torch, Transformer Engine and vLLM import, and all others that cuda.h declares, are generated:
they return 0, success. `build_alone` makes the first two without the CUDA packages, and so without
cuBLAS, NVRTC and what is generated: for tests of streams, memory and NCCL through ctypes."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
_TORCH = importlib.util.find_spec("torch")
PACKAGES = Path(_TORCH.origin).parents[1] if _TORCH and _TORCH.origin else Path()
INCLUDE = [PACKAGES / f"nvidia/{name}/include" for name in ("cu13", "nccl", "cudnn")]
HEADERS_OF_TRITON = PACKAGES / "triton/backends/nvidia/include"
STANDALONE_FUNCTIONS = [
    "runtime.c",
    "streams.c",
    "events.c",
    "memory.c",
    "copies.c",
    "segment.c",
    "counters.c",
    "communicators.c",
    "calls.c",
    "numbers.c",
]
# A preloaded library's own functions must not take the places of others' of the same name.
EXPORTS = "{ global: cu*; __cuda*; nccl*; nvrtc*; nvml*; null_gpu_*; local: *; };"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
EXTENSIONS = (
    "torch/lib/libtorch_cuda*.so",
    "torch/lib/libc10_cuda.so",
    "torch/lib/libtorch_python.so",
    "torch/lib/libtorch_nvshmem.so",
    "transformer_engine/**/*.so",
    "vllm/**/*.so",
)
RUNTIME = r"(?:__)?cuda[A-Z]\w*|cublas\w+|nccl[A-Z]\w+|nvrtc[A-Z]\w+"
BY_NAME = {"cudaDeviceReset"}  # vLLM, through ctypes
DRIVER = r"cu(?!da|blas|dnn|solver|sparse|fft|rand|file|pti)[A-Z]\w*"


def build(folder: Path) -> None:
    """Write the three libraries to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    imported = _imported_symbols()
    runtime = {name for name in imported if re.fullmatch(RUNTIME, name)} | BY_NAME
    driver = {name for name in imported if re.fullmatch(DRIVER, name)} | _declared_by_the_driver()
    sources = [*STANDALONE_FUNCTIONS, "libraries.c", "cudnn.c"]
    _compile_library(folder / "libnullgpu.so", sources, runtime, INCLUDE)
    _compile_library(folder / "libcuda.so.1", ["driver.c"], driver, INCLUDE)
    _compile_library(folder / "libnvidia-ml.so.1", ["nvml.c"], (), INCLUDE)


def build_alone(folder: Path) -> None:
    """Write the runtime with NCCL, and the driver, from the headers that Triton brings."""
    folder.mkdir(parents=True, exist_ok=True)
    _compile_library(folder / "libnullgpu.so", STANDALONE_FUNCTIONS, (), [HEADERS_OF_TRITON])
    _compile_library(folder / "libcuda.so.1", ["driver.c"], (), [HEADERS_OF_TRITON])


def _imported_symbols() -> set[str]:
    """Return every symbol that an extension wants from another library."""
    files = [str(file) for pattern in EXTENSIONS for file in sorted(PACKAGES.glob(pattern))]
    command = ["nm", "-D", "--undefined-only", "--format=just-symbols", *files]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split("@")[0] for line in listed.splitlines()}


def _declared_by_the_driver() -> set[str]:
    header = (INCLUDE[0] / "cuda.h").read_text()
    functions = re.findall(r"CUresult\s+CUDAAPI\s+(cu\w+)\s*\(", header)
    return {*functions, *re.findall(r"#define\s+cu\w+\s+(cu\w+_v\d)\b", header)}


def _compile_library(
    library: Path, sources: list[str], symbols: Iterable[str], include: list[Path]
) -> None:
    written = "".join((HERE / source).read_text() for source in sources)
    # A definition starts its line with a type; the word before its first parenthesis is its name.
    by_hand = set(re.findall(r"^(?!static)\w[\w\s*]*?\b(\w+)\([^;{]*\{", written, re.MULTILINE))
    generated_file = library.with_suffix(".generated.c")
    generated = [f"int {name}(void) {{ return 0; }}\n" for name in sorted(set(symbols) - by_hand)]
    generated_file.write_text("".join(generated))
    exports = library.with_suffix(".exports")
    exports.write_text(EXPORTS)
    headers = [f"-I{HERE}", *(argument for folder in include for argument in ("-isystem", folder))]
    options = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    options.append(f"-Wl,--version-script={exports}")
    files = [*(HERE / source for source in sources), generated_file]
    command = ["cc", *WARNINGS, *options, *headers, *files, "-o", library, "-ldl", "-lpthread"]
    subprocess.run(list(map(str, command)), check=True)
    print(f"{library.name}: {len(by_hand)} functions by hand, {len(generated)} generated")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
