"""Kernels of r1_kernels against eager PyTorch, torch.compile and the public peers, in one run.

Peers: pip install -r requirements/bench.txt; one that is missing or fails is a row with the
reason. Without options: DeepSeek-V3's output layer on a GPU; on a CPU, a size for which eager
PyTorch needs 3 GB."""

import argparse
import dataclasses
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

from r1_kernels_bench import inputs
from r1_kernels_bench.supervisor import worker_results
from tools.bench import host

MEASURED_PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "megatron-core")
LEGEND = """\
time: median of rounds that take every implementation in turn. extra memory: the peak of a call over
what was there before it, its results and gradients included. of bound: the least work the kernel
can do, at the rate measured here for such work alone, over the time. err: against fp64; log-probs
and loss: the largest, of all tokens; others: relative norm, on 256 to 512 rows spread over all.
"""
CPU_NOTE = """\
On a CPU r1_kernels runs its plain-PyTorch backend: its Triton kernels are not what is timed here,
and peers that consist of such kernels do not run."""


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of `python tools/bench kernels`."""
    options.add_argument(
        "--preset", choices=inputs.PRESETS, help="default: full on a GPU, else cpu"
    )
    options.add_argument("--tokens", type=int)
    options.add_argument("--vocab", type=int)
    options.add_argument("--hidden", type=int)
    options.add_argument("--dtype", choices=inputs.DTYPE_NAMES)
    options.add_argument("--tp", type=int, help="measure one rank's share of the vocabulary")
    options.add_argument("--only", action="append", metavar="KERNEL", help="repeatable")
    options.add_argument("--repeats", type=int, help="rounds; default: 5 on a GPU, else 3")
    options.add_argument("--minutes", type=float, default=7.5, help="what does not fit is not run")
    options.add_argument("--plot", type=Path, help="also draw the result here (.png)")
    options.add_argument(
        "--sweep",
        action="store_true",
        help="on a GPU: time block sizes and warps of our kernels instead, and name the best",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return sizes, versions and the cases with their rows."""
    import torch

    if options.sweep:
        return _sweep_results(options)
    from r1_kernels_bench import table
    from r1_kernels_bench.cases import BY_NAME

    on_gpu = torch.cuda.is_available()
    try:
        size = _problem_sizes(options, on_gpu)
        names = _selected_kernels(options.only, list(BY_NAME))
    except ValueError as error:
        sys.exit(str(error))
    environment = _machine_description(on_gpu)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    print(f"{environment['device']}, {environment['date']}\n{size}\n{versions}")
    print(LEGEND if on_gpu else LEGEND + CPU_NOTE)
    if environment["load"] > 0.5 * environment["cores"]:
        load = f"load {environment['load']:.1f} on {environment['cores']} cores"
        print(f"Other work is running here ({load}): the times will suffer from it.")
    task = {
        "cases": names,
        "sizes": dataclasses.asdict(size),
        "device": "cuda" if on_gpu else "cpu",
        "repeats": options.repeats or (5 if on_gpu else 3),
        "deadline": time.time() + 60 * options.minutes,
    }
    cases = []
    for name, result in worker_results(task, _show_progress):
        _show_progress("")
        cases.append(table.summarize(name, BY_NAME[name].about, result))
        print("\n" + "\n".join(table.lines(cases[-1])), flush=True)
    if options.plot:
        table.draw(cases, f"{environment['device']}, {size}, {environment['date']}", options.plot)
    return {**environment, "sizes": task["sizes"], "repeats": task["repeats"], "cases": cases}


def _sweep_results(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine and the entries of `sweep.run`, or exit where no sweep is possible."""
    from r1_kernels_bench import sweep

    if refusal_reason := sweep.refusal(options):
        sys.exit(refusal_reason)
    environment = _machine_description(on_gpu=True)
    print(f"{environment['device']}, {environment['date']}; {sweep.SUMMARY}")
    return {**environment, "sweep": sweep.run(options)}


def _problem_sizes(options: argparse.Namespace, on_gpu: bool) -> inputs.ProblemSizes:
    preset = options.preset or ("full" if on_gpu else "cpu")
    names = [field.name for field in dataclasses.fields(inputs.ProblemSizes)]
    overrides = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    return dataclasses.replace(inputs.PRESETS[preset], **overrides)


def _selected_kernels(only: list[str] | None, kernel_names: list[str]) -> list[str]:
    """Return the selected kernels; `linear_token_logprobs` selects both of its tables."""
    selection = [
        name for name in kernel_names if not only or {name, name.split("+")[0]} & set(only)
    ]
    for name in only or []:
        if name not in {
            part
            for kernel_name in kernel_names
            for part in (kernel_name, kernel_name.split("+")[0])
        }:
            raise ValueError(f"--only {name}: the kernels are {', '.join(kernel_names)}")
    return selection


def _machine_description(on_gpu: bool) -> dict[str, Any]:
    import torch

    if on_gpu:
        device = torch.cuda.get_device_name()
    else:
        device = f"{host.processor()}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": host.versions(MEASURED_PACKAGES),
        "cores": host.num_cores(),
        "load": os.getloadavg()[0],
    }


def _show_progress(doing: str) -> None:
    """Show what is being measured on one terminal line that the next call overwrites."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{doing}")
        sys.stderr.flush()
