"""Reads the machine code of the compiled Triton kernels, without a GPU and without timing.

Every kernel in r1_kernels.registry is compiled ahead of time for sm_80, sm_90 and sm_100, in the
specializations of its launches in r1_kernels.examples. Reported per element of the main loop: bytes
moved, instructions, exponentials (MUFU). For sm_90 also the upper bounds in elements per second of
an H200: by its memory, its issue slots and its MUFU units.

--alternatives compiles instead, of each launch that `kernels --sweep` times, every block size and
number of warps that it tries."""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

HEADER = (
    f"{'kernel':52} {'arch':>5} {'regs':>4} {'spill':>5} {'shared':>6} {'warps':>5} {'per SM':>6} "
    f"{'load':>4} {'store':>5} {'KiB/SM':>6} {'bar':>3} {'shfl':>4} {'B/el':>6} {'MUFU':>5} "
    f"{'instr':>6} {'memory':>7} {'issue':>7} {'mufu':>7}"
)
LEGEND = """\
per SM: programs at once. load, store: bytes of the widest in the main loop. KiB/SM: loads of one
turn of it in all programs of an SM. bar, shfl: barriers and shuffles in it. memory, issue, mufu:
upper bounds in 1e12 elements/s for an H200. A kernel without a loop: all of it."""

# Limits of a multiprocessor (SM). Sources: CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability" and "Arithmetic Instructions"; NVIDIA's data sheet of the H200 (4.8 TB/s).
# Not modelled: latency, and the half rate of integer, minimum and conversion instructions.
COMPUTE_CAPABILITIES = (80, 90, 100)
SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of an SM
RESERVED_SHARED = 1024  # bytes per program that CUDA itself uses
REGISTERS = 65_536  # of an SM
REGISTER_UNIT = 256  # granularity of a warp's registers
THREADS = 2_048
PROGRAMS = 32

H200 = 90
SMS = 132
CLOCK = 1.755e9
ISSUED = 4 * 32  # instructions of threads per clock and SM: four schedulers, a warp each
MUFU = 16  # exponentials, reciprocals, ... per clock and SM
BANDWIDTH = 4.8e12


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of `python tools/bench resources`."""
    options.add_argument("--only", action="append", metavar="KERNEL", help="repeatable")
    options.add_argument(
        "--alternatives",
        action="store_true",
        help="compile the block sizes and warps of `kernels --sweep` instead of those in use (*)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return Triton's version and an entry for each case and architecture."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: Triton's interpreter compiles nothing; unset it, start again")
    # Here, as the other benches also run without Triton.
    import triton
    from r1_kernels.registry import KERNELS

    from r1_kernels_bench import compiled

    kernel_names = [kernel.name for kernel in KERNELS]
    if unknown_names := set(options.only or ()) - set(kernel_names):
        sys.exit(
            f"--only {', '.join(sorted(unknown_names))}: the kernels are {', '.join(kernel_names)}"
        )
    kernels = [kernel for kernel in KERNELS if kernel.name in (options.only or kernel_names)]
    entries: dict[str, dict[str, Any]] = {}
    print(HEADER)
    for kernel in kernels:
        variants = alternatives(kernel) if options.alternatives else _real_launches(kernel)
        for name, example in variants:
            for arch in COMPUTE_CAPABILITIES:
                for launch in compiled.compile_launches(kernel, example, arch):
                    entry = measure(example, launch, arch)
                    entries[f"{name}, sm_{arch}"] = entry
                    print(_table_line(name, arch, entry), flush=True)
    print(LEGEND)
    missing_kernels = compiled.kernels() - {entry["kernel"] for entry in entries.values()}
    if missing_kernels and len(kernels) == len(KERNELS):
        sys.exit(
            f"no example in r1_kernels/examples.py launches {', '.join(sorted(missing_kernels))}"
        )
    return {"triton": triton.__version__, "kernels": entries}


def _real_launches(kernel: Any) -> Iterator[tuple[str, Any]]:
    """Yield each launch of a kernel in real runs, by its name.

    Args:
        kernel: registry.Kernel."""
    from r1_kernels.examples import ExampleSizes, example_launches

    for example in example_launches(kernel, ExampleSizes(), "meta"):
        yield example.name, example


def alternatives(kernel: Any) -> Iterator[tuple[str, Any]]:
    """Yield the launches of a kernel that a sweep times, each while one of its values applies.

    Args:
        kernel: registry.Kernel."""
    from r1_kernels.examples import ExampleSizes, example_launches

    from r1_kernels_bench import sweep

    for choices in (choices for choices in sweep.PLAN if choices.kernel == kernel.name):
        print(f"{' / '.join(choices.values)} in {choices.place}; * in use")
        sizes = ExampleSizes(vocab_size=ExampleSizes().vocab_size + choices.more_columns)
        examples = [
            e for e in example_launches(kernel, sizes, "meta") if e.name in choices.launches
        ]
        columns = f", {sizes.vocab_size} columns" if choices.more_columns else ""
        in_use = choices.present_values
        for values in choices.candidates:
            label = "/".join(map(str, values.values())) + ("*" if values == in_use else "")
            with choices.apply(values):
                for example in examples:
                    yield f"{example.name}{columns}, {label}", example


def measure(example: Any, launch: Any, arch: int) -> dict[str, Any]:
    """Return one kernel's entry.

    Args:
        example: examples.ExampleLaunch.
        launch: compiled.Launch.
        arch: the compute capability that it was compiled for, such as 90."""
    from r1_kernels_bench import compiled

    kernel, warps = launch.kernel, launch.kernel.metadata.num_warps
    threads = 32 * warps
    traffic = compiled.traffic(kernel.asm["ttir"])
    elements_per_program = traffic.elements or example.num_elements / launch.programs
    resources = compiled.resources(kernel)
    loop = compiled.main_loop(kernel, traffic, elements_per_program / threads)
    programs = programs_per_sm(arch, resources["registers"], resources["shared_bytes"], warps)
    num_bytes = (traffic.loaded + traffic.stored) / elements_per_program
    entry = {
        "kernel": launch.name,
        **resources,
        "warps": warps,
        "programs_per_sm": programs,
        **loop,
        "loading_bytes_per_sm": loop["loaded_bytes"] * threads * programs,
        "bytes": num_bytes,
        "least_bytes": example.least_bytes,
    }
    if arch == H200:
        limits = bounds(num_bytes, loop["instructions"], loop["mufu"])
        entry["elements_per_second"] = limits
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}


def _table_line(name: str, arch: int, e: dict[str, Any]) -> str:
    limits = e.get("elements_per_second", {}).values()
    return (
        f"{name:52} {arch:5} {e['registers']:4} {e['spilled_bytes']:5} {e['shared_bytes']:6} "
        f"{e['warps']:5} {e['programs_per_sm']:6} {e['widest_load']:4} {e['widest_store']:5} "
        f"{e['loading_bytes_per_sm'] / 1024:6.0f} {e['barriers']:3} {e['shuffles']:4} "
        f"{e['bytes']:6.2f} {e['mufu']:5.2f} {e['instructions']:6.2f}"
        + "".join(f" {limit / 1e12:7.2f}" for limit in limits)
    )


def programs_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs of a kernel fit on an SM at once.

    Args:
        arch: compute capability, 90 for sm_90.
        registers: registers of a thread.
        shared: bytes of shared memory of a program.
        warps: warps of a program, of 32 threads each."""
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        PROGRAMS,
        THREADS // (32 * warps),
        REGISTERS // warp_registers // warps,
        SHARED_KIB[arch] * 1024 // (shared + RESERVED_SHARED),
    )


def bounds(num_bytes: float, instructions: float, mufu: float) -> dict[str, float]:
    """Return an H200's upper bounds in elements per second, from bytes, instructions and MUFU
    operations per element.

    Args:
        num_bytes: bytes moved per element.
        instructions: instructions per element.
        mufu: MUFU operations per element."""
    return {
        "memory": BANDWIDTH / num_bytes,
        "issue": SMS * CLOCK * ISSUED / instructions,
        "mufu": SMS * CLOCK * MUFU / mufu if mufu else float("inf"),
    }
