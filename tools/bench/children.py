"""Processes that the benches start: their environment, and megatron-r1's command line."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with the repository, its kernels and grading importable.

    OMP_WAIT_POLICY is passive unless it is set: threads that spin at the end of every operation
    starve each other where processes share a core."""
    paths = [
        str(ROOT),
        str(ROOT / "kernels"),
        str(ROOT / "grading"),
        os.environ.get("PYTHONPATH", ""),
    ]
    path = os.pathsep.join(filter(None, paths))
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path, **more}


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an importable function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
        return own.submit(function, *arguments).result()


def core_seconds(pid: int) -> float:
    """Return the processor seconds so far of a process and of all below it."""
    import psutil  # here, as the bench of kernels needs little more than torch and Triton

    process, used = psutil.Process(pid), 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(each.cpu_times()[:2])  # user and system
    return used


def megatron_r1(verb: str, recipe: Path, settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return the command line that runs a recipe, with `settings` by dotted key."""
    options = [f"--{key}={value}" for key, value in (settings or {}).items()]
    return [sys.executable, "-m", "megatron_r1", verb, str(recipe), *options]


def run_to_end(command: list[str], **more: str) -> str:
    """Run `command` from the repository root with `environment(**more)`; return its output, or exit
    with its standard error if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout
