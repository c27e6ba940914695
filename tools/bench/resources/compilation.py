"""Compile the kernels that a primitive launches, without the GPU.

Primitives run on meta tensors, which have shapes and no memory. Triton's driver is replaced by one
that names the target architecture, and a launch compiles and stops. The specialization (types,
divisibility by 16, constants, warps) is that of a launch on a GPU, by Triton's own rules."""

import importlib
import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from r1_kernels.examples import ExampleLaunch
from r1_kernels.primitives import blockwise_triton
from r1_kernels.registry import KERNELS, Kernel, primitives
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """A kernel as it was compiled and launched. programs: of the grid; kernel: Triton's compiled
    one, with `asm` and `metadata`."""

    name: str
    programs: int
    kernel: Any


def compile_launches(kernel: Kernel, example: ExampleLaunch, arch: int) -> list[Launch]:
    """Call the primitive without a GPU; return what it would launch on capability `arch`."""
    launches: list[Launch] = []
    compile_and_run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = compile_and_run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.__name__, grid[0], compiled))

    # The architecture is also the device number, because Triton keeps one target per device.
    absent_gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        # It queries PyTorch for the tensor's device, not Triton's driver.
        mock.patch.object(blockwise_triton, "_has_e4m3", return_value=arch >= 89),
        mock.patch.object(triton.runtime.driver, "_active", absent_gpu),
    ):
        getattr(primitives("triton"), kernel.name)(*example.arguments)
    return launches


def kernels() -> set[str]:
    """Return the names of all Triton kernels: Triton functions that no other one calls."""
    functions: dict[str, JITFunction] = {}
    for stem in {kernel.stem for kernel in KERNELS}:
        names = vars(importlib.import_module(f"r1_kernels.primitives.{stem}_triton"))
        functions |= {k: v for k, v in names.items() if isinstance(v, JITFunction)}
    called = {name for f in functions.values() for name in inspect.unwrap(f.fn).__code__.co_names}
    return set(functions) - called
