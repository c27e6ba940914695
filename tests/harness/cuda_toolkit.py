"""A folder that looks like a CUDA toolkit."""

from pathlib import Path


def write_toolkit(folder: Path, nvcc: str | None = "13.0", headers: int | None = 13000) -> Path:
    """Write an nvcc that says its version, and a header of a version."""
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    if nvcc:
        program = folder / "bin" / "nvcc"
        program.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {nvcc}, V{nvcc}.88\n")
        program.chmod(0o755)
    if headers:
        text = f"#define CUDART_VERSION  {headers}\n"
        (folder / "include" / "cuda_runtime_api.h").write_text(text)
    return folder
