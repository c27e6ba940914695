"""`python tools/gpu_check`: the checks of docs/gpu-checklist.md on a machine with a GPU.

It needs no network. Checks whose modules are not installed are skipped, by name; torch, Triton,
pytest, numpy and xxhash are enough for the kernels' part. Results, a page and the output of each
check are written to --out after every check. Status 1: a check failed."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1.files import atomic_write
from tools.bench import machine
from tools.bench.children import ROOT
from tools.gpu_check import page, runner
from tools.gpu_check.checks import CHECKS, Check

PACKAGES = (
    *("torch", "triton", "transformer-engine", "megatron-core", "vllm", "flash-attn", "numpy"),
    *("liger-kernel", "trl", "quack-kernels"),
)
QUERY = "name,driver_version,memory.total,clocks.max.sm,mig.mode.current"


def main() -> int:
    """Run the checks; return the exit status."""
    import torch

    chosen = _arguments()
    num_gpus = torch.cuda.device_count()
    if chosen.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        num_gpus = 1
    elif not num_gpus:
        sys.exit(
            "no GPU: torch.cuda.device_count() is 0. Run this where one is, or add --interpret, "
            "which runs the kernels' part in Triton's interpreter"
        )
    checks = _selected(chosen.only, chosen.interpret)
    about = {
        "command": " ".join(["python tools/gpu_check", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "interpreted": chosen.interpret,
        **_machine(),
    }
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(about, indent=1), flush=True)
    outcomes: list[runner.Outcome] = []
    deadline = time.time() + 60 * chosen.minutes
    for outcome in runner.run_all(checks, out, deadline, num_gpus):
        outcomes.append(outcome)
        print(f"{outcome.status:8} {outcome.seconds:6.1f} s  {outcome.check.name}", flush=True)
        if outcome.status != "passed":
            print("\n".join(f"    {line}" for line in outcome.tail), flush=True)
        results = {**about, "checks": [each.as_json() for each in outcomes]}
        atomic_write(out / "gpu_check.json", json.dumps(results, indent=1) + "\n")
        atomic_write(out / "gpu_check.md", page.write(about, outcomes))
    print(f"results: {out}/gpu_check.md")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all checks together")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="a name or its beginning; repeatable",
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="the kernels' part on a CPU, without times",
    )
    return parser.parse_args()


def _selected(only: list[str] | None, interpret: bool) -> list[Check]:
    names = [check.name for check in CHECKS]
    for name in only or []:
        if not any(known.startswith(name) for known in names):
            sys.exit(f"--only {name}: the checks are {', '.join(names)}")
    found = [c for c in CHECKS if not only or any(c.name.startswith(name) for name in only)]
    if not interpret:
        return found
    return [
        replace(check, arguments=check.interpreted, settles=())
        for check in found
        if check.interpreted
    ]


def _machine() -> dict[str, Any]:
    """Return GPUs, CUDA, Python, processor and versions; entries are "unknown" where a tool or a
    module is missing."""
    import torch

    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "processor": f"{machine.processor()}, {machine.num_cores()} cores",
        "cuda": torch.version.cuda or "none: torch is a CPU build",
        "gpus": [],
        "nvidia-smi": _nvidia_smi(),
        "versions": machine.versions(PACKAGES),
    }
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"sm_{about.major}{about.minor}"
        memory = f"{about.total_memory / 2**30:.1f} GiB"
        found["gpus"].append(f"{about.name}, {capability}, {memory}")
    return found


def _nvidia_smi() -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"unknown ({error})"]
    return (done.stdout or done.stderr).strip().splitlines()
