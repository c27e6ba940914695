"""This machine, its packages and cores, and the processes that benches start on it.

Of the cores it has the number and how much they are worth; of the processes the environment and
megatron-r1's command line.

Two cores of a virtual machine may be two threads of one physical core, and this changes from hour
to hour. Processes that should run side by side then take turns, so figures of parallel work are
printed next to `cores_worth()`."""

import contextlib
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

HASH_SECONDS = 0.3
NUM_BYTES = 1 << 18
"""Fits one core's own cache."""


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def cores_worth() -> float:
    """Return the work that processes on all cores do in the time one alone does 1."""
    (single_count,), all_at_once = _hash_counts(1), _hash_counts(num_cores())
    return sum(all_at_once) / single_count


def processor() -> str:
    """Return the processor's model name, or the architecture where Linux does not give it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else f"{platform.machine()} CPU"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return each package's version, or "not installed"."""
    by_package = {}
    for name in packages:
        try:
            by_package[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            by_package[name] = "not installed"
    return by_package


def _hash_counts(num_processes: int) -> list[int]:
    """Return how often each of `num_processes` simultaneous processes hashes its own bytes."""
    context = multiprocessing.get_context("fork")
    begin, counts = context.Barrier(num_processes), context.SimpleQueue()
    workers = [
        context.Process(target=_hash_bytes, args=(begin, counts)) for _ in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    num_hashes = [counts.get() for _ in workers]
    for worker in workers:
        worker.join()
    return num_hashes


def _hash_bytes(begin: Any, counts: Any) -> None:
    values, count = b"\1" * NUM_BYTES, 0
    begin.wait()
    end = time.perf_counter() + HASH_SECONDS
    while time.perf_counter() < end:
        xxhash.xxh3_64_intdigest(values)
        count += 1
    counts.put(count)


ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
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
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path, **variables}


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an importable function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def core_seconds(pid: int, *, with_ended: bool = False) -> float:
    """Return the processor seconds so far of a process and of all below it.

    Args:
        pid: the process.
        with_ended: whether children that have ended count, once their parents have noticed."""
    import psutil  # here, as the bench of kernels needs little more than torch and Triton

    root, seconds = psutil.Process(pid), 0.0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            # user and system, then those of ended children
            seconds += sum(process.cpu_times()[: 4 if with_ended else 2])
    return seconds


def megatron_r1(verb: str, recipe: Path, settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return the command line that runs a recipe, with `settings` by dotted key.

    Args:
        verb: the subcommand.
        recipe: the recipe's file.
        settings: values by dotted key."""
    options = [f"--{key}={value}" for key, value in (settings or {}).items()]
    return [sys.executable, "-m", "megatron_r1", verb, str(recipe), *options]


def run_to_end(command: list[str], **variables: str) -> str:
    """Run `command` from the repository root with `environment(**variables)`; return its output,
    or exit with its standard error if it fails."""
    process = subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{process.stderr[-4000:]}")
    return process.stdout
