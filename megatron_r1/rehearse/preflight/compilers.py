"""One small kernel by each compiler that the run will need on this node."""

import ctypes
import os
import subprocess
import time

import torch
import triton
import triton.language as tl

from megatron_r1.base.errors import UserError
from megatron_r1.engines.server.environment_variables import compiler_environment
from megatron_r1.models.loaded_libraries import loaded_libraries
from megatron_r1.rehearse.preflight.facts import Compilation

KERNEL = b'extern "C" __global__ void one(float *x) { *x = 1; }'
CCCL = b"#include <cuda/std/cstdint>\n"
"""A header of the library that DeepGEMM and FlashInfer include: it refuses another CUDA's nvcc."""


def compile_kernels(*, with_cudnn: bool, with_nvcc: bool) -> dict[str, Compilation]:
    """Return how each compiler has fared: Triton's, for the kernels of the loss; NVRTC, by which
    cuDNN compiles attention; nvcc, for DeepGEMM and FlashInfer in engines."""
    compilers = {"Triton": _launch_with_triton}
    if with_cudnn:
        compilers["NVRTC"] = _compile_with_nvrtc
    if with_nvcc:
        compilers["nvcc"] = _compile_with_nvcc
    compilations = {}
    for name, compile_kernel in compilers.items():
        start, error = time.perf_counter(), ""
        try:
            compile_kernel()
        except Exception as failure:  # noqa: BLE001 - a compiler, its files or its own compiler
            error = f"{type(failure).__name__}: {failure}"
        compilations[name] = Compilation(error, time.perf_counter() - start)
    return compilations


def engines_compile(*, in_fp8: bool) -> bool:
    """Return whether engines of this node need nvcc, or will take the one that is here."""
    try:
        return in_fp8 or "CUDA_HOME" in compiler_environment()
    except UserError:  # which the compilation tells
        return True


@triton.jit
def _one(out):
    tl.store(out, 1.0)


def _launch_with_triton() -> None:
    """Compile for this GPU, and the C code by which Triton launches. Its cache serves the next."""
    _one[(1,)](torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()


def _compile_with_nvrtc() -> None:
    files = [library.file for library in loaded_libraries("NVRTC")]
    name = f"libnvrtc.so.{str(torch.version.cuda).partition('.')[0]}"
    nvrtc, program = ctypes.CDLL((files or [name])[0]), ctypes.c_void_p()
    option = ctypes.c_char_p(f"--gpu-architecture={_architecture()}".encode())
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), KERNEL, None, 0, None, None)
    if nvrtc.nvrtcCompileProgram(program, 1, ctypes.byref(option)):
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())


def _compile_with_nvcc() -> None:
    environment = compiler_environment()
    if "CUDA_HOME" not in environment:
        raise RuntimeError("there is none: set CUDA_HOME to a CUDA toolkit, or make setup-cuda")
    command = [f"{environment['CUDA_HOME']}/bin/nvcc", f"-arch={_architecture()}", "-cubin"]
    command += ["-x", "cu", "-", "-o", os.devnull]
    process = subprocess.run(
        command, input=CCCL + KERNEL, capture_output=True, env=os.environ | environment
    )
    if process.returncode:
        raise RuntimeError(process.stderr.decode())


def _architecture() -> str:
    """Return that of this GPU, from Hopper on with what only this one has: DeepGEMM needs it."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"
