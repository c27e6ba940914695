"""`python tools/gpu_check`: the checks of docs/gpu-checklist.md on a machine with a GPU.

They come in two parts, of one GPU and of two or more, of nine minutes each, ordered by the damage
of a failure: the flagship recipe's own way in miniature first. It needs no network. A check whose
modules are not installed is not possible, and says so; torch, Triton, pytest, numpy and xxhash are
enough for the kernels. Results, a page and the output of each check are written to --out after
every check. Status 1: a check failed."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1.base.files import atomic_write
from tools.bench import host
from tools.bench.host import ROOT
from tools.gpu_check import runner, verdict
from tools.gpu_check.checks import CHECKS, PARTS, Check

PACKAGES = (
    "torch",
    "triton",
    "transformer-engine",
    "megatron-core",
    "vllm",
    "flash-attn",
    "numpy",
    "liger-kernel",
    "trl",
    "quack-kernels",
)
QUERY = "name,driver_version,memory.total,clocks.max.sm,mig.mode.current"
NULL_GPU = "(null)"
"""A part of the name of the null GPU's devices (tools/null_gpu/shim/null_gpu.h)."""

ON_NULL_GPU = (
    "**This is the null GPU of tools/null_gpu**: kernels do not run, or compute on the host, so "
    "times are meaningless, and nothing is settled."
)


def main() -> int:
    """Run the checks; return the exit status."""
    import torch

    args = _parse_arguments()
    num_gpus = torch.cuda.device_count()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        num_gpus = 1
    elif not num_gpus:
        sys.exit(
            "no GPU: torch.cuda.device_count() is 0. Run this where one is, or add --interpret, "
            "which runs the kernels' part in Triton's interpreter"
        )
    checks = _select_checks(args.only, args.interpret, args.part)
    description = {
        "command": " ".join(["python tools/gpu_check", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "interpreted": args.interpret,
        **_machine_description(),
    }
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(description, indent=1), flush=True)
    outcomes: list[runner.CheckOutcome] = []
    for part in PARTS:
        deadline = time.time() + 60 * args.minutes
        part_checks = [check for check in checks if check.part == part]
        for outcome in runner.run_all(part_checks, out, deadline, num_gpus):
            outcomes.append(outcome)
            _show_outcome(outcome)
            results = {**description, "checks": [each.as_json() for each in outcomes]}
            atomic_write(out / "gpu_check.json", json.dumps(results, indent=1) + "\n")
            atomic_write(out / "gpu_check.md", page(description, outcomes))
    print(f"results: {out}/gpu_check.md")
    return int(any(outcome.status == verdict.FAILED for outcome in outcomes))


def _show_outcome(outcome: runner.CheckOutcome) -> None:
    reason = f": {outcome.reason}" if outcome.reason else ""
    print(f"{outcome.status:8} {outcome.seconds:6.1f} s  {outcome.check.name}{reason}", flush=True)
    if figures := _figures_line(outcome):
        print(f"    {figures}", flush=True)
    if outcome.status == verdict.FAILED:
        print("\n".join(f"    {line}" for line in outcome.tail), flush=True)


def _figures_line(outcome: runner.CheckOutcome) -> str:
    """Return the figures of a check in one line."""
    entries = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in outcome.figures.items()
        if value not in (None, "")
    )
    return "; ".join(entries)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all checks of a part")
    parser.add_argument("--part", choices=PARTS, help="of one GPU or of several; default: both")
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


def _select_checks(only: list[str] | None, interprets: bool, part: str | None) -> list[Check]:
    names = [check.name for check in CHECKS]
    for name in only or []:
        if not any(check_name.startswith(name) for check_name in names):
            sys.exit(f"--only {name}: the checks are {', '.join(names)}")
    checks = [c for c in CHECKS if not only or any(c.name.startswith(name) for name in only)]
    checks = [check for check in checks if part in (None, check.part)]
    if not interprets:
        return checks
    return [
        replace(check, arguments=check.interpreted, settles=())
        for check in checks
        if check.interpreted
    ]


def _machine_description() -> dict[str, Any]:
    """Return GPUs, CUDA, Python, processor and versions; entries are "unknown" where a tool or a
    module is missing."""
    import torch

    machine: dict[str, Any] = {
        "python": sys.version.split()[0],
        "processor": f"{host.processor()}, {host.num_cores()} cores",
        "cuda": torch.version.cuda or "none: torch is a CPU build",
        "gpus": [],
        "nvidia-smi": _nvidia_smi(),
        "versions": host.versions(PACKAGES),
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        memory = f"{device.total_memory / 2**30:.1f} GiB"
        machine["gpus"].append(f"{device.name}, {capability}, {memory}")
    return machine


def _nvidia_smi() -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"unknown ({error})"]
    return (process.stdout or process.stderr).strip().splitlines()


def page(machine: dict[str, Any], outcomes: Sequence[runner.CheckOutcome]) -> str:
    """Return the page in Markdown: the machine, a row per check, and the output of what failed."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    is_null = any(NULL_GPU in gpu for gpu in machine["gpus"])
    lines = [
        f"# GPU check, {machine['date']}",
        "",
        f"`{machine['command']}`; {'; '.join(machine['gpus']) or 'no GPU'}; driver and clocks: "
        f"{'; '.join(machine['nvidia-smi'])}; CUDA {machine['cuda']}; Python {machine['python']}; "
        f"{machine['processor']}.",
        "",
        versions + ".",
        "",
        *([ON_NULL_GPU, ""] if is_null else []),
        "| check | result | seconds | settles in docs/gpu-checklist.md | figures |",
        "|---|---|---:|---|---|",
    ]
    for outcome in outcomes:
        result = outcome.status + (f": {outcome.reason}" if outcome.reason else "")
        is_settled = outcome.status == verdict.PASSED and not is_null
        cells = (
            outcome.check.name,
            result,
            f"{outcome.seconds:.0f}",
            "; ".join(outcome.check.settles) if is_settled else "",
            _figures_line(outcome),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for outcome in outcomes:
        if outcome.status == verdict.FAILED:
            check = outcome.check
            lines += ["", f"## Failed: {check.name}", "", outcome.reason, ""]
            lines += [f"`{check.command}`", "", "```", *outcome.tail, "```"]
    return "\n".join(lines) + "\n"
