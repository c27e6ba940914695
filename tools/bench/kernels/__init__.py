"""Kernels of r1_kernels against eager PyTorch, torch.compile and the public peers, in one run.

Peers: pip install -r requirements/bench.txt; one that is missing or fails is a row with the reason.
Without options: DeepSeek-V3's output layer on a GPU; on a CPU, a size for which eager PyTorch needs
3 GB."""

import argparse
import dataclasses
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench import machine
from tools.bench.kernels import sizes

PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "megatron-core")
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
    options.add_argument("--preset", choices=sizes.PRESETS, help="default: full on a GPU, else cpu")
    options.add_argument("--tokens", type=int)
    options.add_argument("--vocab", type=int)
    options.add_argument("--hidden", type=int)
    options.add_argument("--dtype", choices=sizes.DTYPES)
    options.add_argument("--tp", type=int, help="measure one rank's share of the vocabulary")
    options.add_argument("--only", action="append", metavar="KERNEL", help="repeatable")
    options.add_argument("--repeats", type=int, help="rounds; default: 5 on a GPU, else 3")
    options.add_argument("--minutes", type=float, default=7.5, help="what does not fit is not run")
    options.add_argument("--plot", type=Path, help="also draw the result here (.png)")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return sizes, versions and the cases with their rows."""
    import torch

    from tools.bench.kernels import supervise, table
    from tools.bench.kernels.cases import BY_NAME

    on_gpu = torch.cuda.is_available()
    try:
        size = _sizes(chosen, on_gpu)
        names = _names(chosen.only, list(BY_NAME))
    except ValueError as error:
        sys.exit(str(error))
    about = _about(on_gpu)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['device']}, {about['date']}\n{size}\n{versions}")
    print(LEGEND if on_gpu else LEGEND + CPU_NOTE)
    if about["load"] > 0.5 * about["cores"]:
        where = f"load {about['load']:.1f} on {about['cores']} cores"
        print(f"Other work is running here ({where}): the times will suffer from it.")
    task = {
        "cases": names,
        "sizes": dataclasses.asdict(size),
        "device": "cuda" if on_gpu else "cpu",
        "repeats": chosen.repeats or (5 if on_gpu else 3),
        "deadline": time.time() + 60 * chosen.minutes,
    }
    cases = []
    for name, result in supervise.results(task, _progress):
        _progress("")
        cases.append(table.summarized(name, BY_NAME[name].about, result))
        print("\n" + "\n".join(table.lines(cases[-1])), flush=True)
    if chosen.plot:
        table.draw(cases, f"{about['device']}, {size}, {about['date']}", chosen.plot)
    return {**about, "sizes": task["sizes"], "repeats": task["repeats"], "cases": cases}


def _sizes(chosen: argparse.Namespace, on_gpu: bool) -> sizes.ProblemSizes:
    preset = chosen.preset or ("full" if on_gpu else "cpu")
    names = [field.name for field in dataclasses.fields(sizes.ProblemSizes)]
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    return dataclasses.replace(sizes.PRESETS[preset], **given)


def _names(only: list[str] | None, known: list[str]) -> list[str]:
    """Return the selected kernels; `linear_token_logprobs` selects both of its tables."""
    chosen = [name for name in known if not only or {name, name.split("+")[0]} & set(only)]
    for name in only or []:
        if name not in {part for each in known for part in (each, each.split("+")[0])}:
            raise ValueError(f"--only {name}: the kernels are {', '.join(known)}")
    return chosen


def _about(on_gpu: bool) -> dict[str, Any]:
    import torch

    if on_gpu:
        device = torch.cuda.get_device_name()
    else:
        device = f"{machine.processor()}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": machine.versions(PACKAGES),
        "cores": machine.num_cores(),
        "load": os.getloadavg()[0],
    }


def _progress(doing: str) -> None:
    """Show what is being measured on one terminal line that the next call overwrites."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{doing}")
        sys.stderr.flush()
