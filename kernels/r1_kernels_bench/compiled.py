"""The kernels that a primitive launches, compiled without the GPU, and what their code does:
resources, and the work of the main loop per element.

Primitives run on meta tensors, which have shapes and no memory. Triton's driver is replaced by one
that names the target architecture, and a launch compiles and stops. The specialization (types,
divisibility by 16, constants, warps) is that of a launch on a GPU, by Triton's own rules.

Triton's IR gives the elements that one iteration of the source's loop handles and the bytes it
moves; the machine code (SASS) gives the instructions. ptxas may unroll: the ratio of loaded bytes
is the number of source iterations in one iteration of its loop."""

import importlib
import inspect
import re
import subprocess
import tempfile
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from r1_kernels.examples import ExampleLaunch
from r1_kernels.primitives import blockwise_triton
from r1_kernels.registry import KERNELS, Kernel, load_primitives
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """A kernel as it was compiled and launched.

    Attributes:
        name: the kernel.
        programs: the number of programs in the grid.
        kernel: Triton's compiled one, with `asm` and `metadata`."""

    name: str
    programs: int
    kernel: Any


def compile_launches(kernel: Kernel, example: ExampleLaunch, arch: int) -> list[Launch]:
    """Call the primitive without a GPU; return what it would launch on capability `arch`.

    Args:
        kernel: the primitive.
        example: its arguments, on meta tensors.
        arch: compute capability, 90 for sm_90."""
    launches: list[Launch] = []
    compile_and_run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled_kernel = compile_and_run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.__name__, grid[0], compiled_kernel))

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
        getattr(load_primitives("triton"), kernel.name)(*example.arguments)
    return launches


def kernels() -> set[str]:
    """Return the names of all Triton kernels: Triton functions that no other one calls."""
    functions: dict[str, JITFunction] = {}
    for stem in {kernel.stem for kernel in KERNELS}:
        names = vars(importlib.import_module(f"r1_kernels.primitives.{stem}_triton"))
        functions |= {k: v for k, v in names.items() if isinstance(v, JITFunction)}
    called_names = {
        name for f in functions.values() for name in inspect.unwrap(f.fn).__code__.co_names
    }
    return set(functions) - called_names


INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\S+)\s*([^;]*);", re.MULTILINE
)
ACCESS = re.compile(r"tt\.(load|store) .*tensor<([\dx]+)x!tt\.ptr<(\w+)>>")


class Traffic(NamedTuple):
    """Elements handled, bytes loaded and stored in one iteration of the source's main loop; in the
    whole program without a loop, where `elements` is None.

    Attributes:
        elements: elements handled.
        loaded: bytes loaded.
        stored: bytes stored."""

    elements: int | None
    loaded: int
    stored: int


class Instruction(NamedTuple):
    address: int
    opcode: str
    operands: str

    @property
    def num_bytes(self) -> int:
        """Bytes of one thread's memory access."""
        width = re.search(r"\.(?:[US]?(8|16)|(32|64|128|256))(?:\.|$)", self.opcode)
        return int(width[1] or width[2]) // 8 if width else 4

    def is_a(self, *names: str) -> bool:
        return self.opcode.split(".")[0] in names


def traffic(ttir: str) -> Traffic:
    """Return the traffic of the first loop that loads tensors, or of everything without one."""
    lines = ttir.splitlines()
    for number, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = line[: -len(line.lstrip(" "))]
        end = next(i for i in range(number, len(lines)) if lines[i].startswith(indent + "}"))
        loaded_bytes, stored_bytes = _moved_bytes(lines[number:end])
        if loaded_bytes:
            step = re.search(r"step %c(\d+)_i(?:32|64)", line)
            assert step, f"a loop whose step is no constant: {line}"
            return Traffic(int(step[1]), loaded_bytes, stored_bytes)
    return Traffic(None, *_moved_bytes(lines))


def _moved_bytes(lines: list[str]) -> tuple[int, int]:
    num_bytes = {"load": 0, "store": 0}
    for line in lines:
        if access := ACCESS.search(line):
            bits = int(re.findall(r"\d+", access[3])[0])
            num_bytes[access[1]] += prod(map(int, access[2].split("x"))) * bits // 8
    return num_bytes["load"], num_bytes["store"]


def resources(kernel: Any) -> dict[str, int]:
    """Return registers, spilled bytes and shared bytes of a kernel compiled by Triton."""
    usage = _cuobjdump_output(kernel, "-res-usage")
    sizes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": sizes["REG"],
        "spilled_bytes": sizes["STACK"] + sizes["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
    }


def main_loop(kernel: Any, kernel_traffic: Traffic, elements: float) -> dict[str, float]:
    """Return what one thread's main loop does; mufu and instructions are per element.

    Args:
        kernel: Triton's compiled kernel.
        kernel_traffic: the bytes that it moves.
        elements: the elements of one thread; with a loop, in one iteration of the source's loop."""
    body = _innermost_loop(
        _sass_instructions(_cuobjdump_output(kernel, "-sass")), kernel_traffic.elements is not None
    )
    loads = [i.num_bytes for i in body if i.is_a("LDG")]
    stores = [i.num_bytes for i in body if i.is_a("STG")]
    if kernel_traffic.elements is not None:
        elements *= sum(loads) * 32 * kernel.metadata.num_warps / kernel_traffic.loaded
    return {
        "widest_load": max(loads, default=0),
        "widest_store": max(stores, default=0),
        "loaded_bytes": sum(loads),
        "barriers": sum(i.is_a("BAR", "UBAR") for i in body),
        "shuffles": sum(i.is_a("SHFL") for i in body),
        "mufu": sum(i.is_a("MUFU") for i in body) / elements,
        "instructions": len(body) / elements,
    }


def _cuobjdump_output(kernel: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, cubin.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _sass_instructions(sass: str) -> list[Instruction]:
    """Return the instructions without padding."""
    instructions = [
        Instruction(int(a, 16), name, operands) for a, name, operands in INSTRUCTION.findall(sass)
    ]
    assert instructions, f"no instruction in {sass[:200]!r}"
    return [i for i in instructions if not i.is_a("NOP")]


def _innermost_loop(code: list[Instruction], has_loop: bool) -> list[Instruction]:
    """Return the loop with the fewest instructions per loaded byte: the one without masks."""
    if not has_loop:
        return code
    loops = []
    for end, jump in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", jump.operands) if jump.is_a("BRA") else None
        if target and int(target[1], 16) < jump.address:
            body = [i for i in code[: end + 1] if i.address >= int(target[1], 16)]
            loaded_bytes = sum(i.num_bytes for i in body if i.is_a("LDG"))
            if loaded_bytes:
                loops.append((len(body) / loaded_bytes, body))
    assert loops, "the source has a loop that loads, the machine code none"
    return min(loops, key=lambda loop: loop[0])[1]
