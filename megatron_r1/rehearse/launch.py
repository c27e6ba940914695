"""The processes of a rehearsal: the command as a cluster runs it, and its engine hosts."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megatron_r1.base.processes import children
from megatron_r1.config import Config
from megatron_r1.engines.server import gpu

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}
"""More processes than cores: threads that spin would take the cores of those that compute."""


def command(verb: str, recipe: Path, config: Config, settings: Sequence[str]) -> list[str]:
    """Return the command of a verb: with ranks as torchrun starts them where it has several."""
    python = [sys.executable, "-u", "-m"]
    ranks = config.parallel.processes
    arguments = ["megatron_r1", verb, str(recipe), *settings]
    if verb == "sample" or ranks == 1:
        return [*python, *arguments]
    logs = str(Path(config.run.folder) / "logs" / "ranks")
    if not gpu.is_usable():
        return [*python, "megatron_r1.rehearse.forked_ranks", str(ranks), logs, *arguments[1:]]
    # A process that has asked for GPUs must not be forked.
    torchrun = ["--standalone", "--nproc-per-node", str(ranks), "--log-dir", logs]
    torchrun += ["--redirects", "3", "--tee", "0:3"]
    return [*python, "torch.distributed.run", *torchrun, "-m", *arguments]


@contextlib.contextmanager
def started(
    verb: str, recipe: Path, config: Config, settings: Sequence[str], log: Path
) -> Iterator[subprocess.Popen]:
    """Start a verb, with engine hosts if its recipe has them; at the end, kill -9 all of
    their processes that still run, and those that these have started."""
    processes = []
    try:
        if config.rollout.placement == "hosts" and verb in ("rl", "sample"):
            for number in range(config.rollout.engines * config.rollout.hosts_per_engine):
                processes.append(_host(config, number, log.with_name(f"host-{number}.log")))
        main = children.start(command(verb, recipe, config, settings), log, QUIET)
        processes.insert(0, main)
        yield main
    finally:
        for process in processes:
            _kill_all(process)


def cpu_seconds() -> float:
    """Return the CPU seconds that all descendants of this process have taken until now."""
    used = os.times()
    total = used.children_user + used.children_system  # of those that have ended
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _kill_all(process: subprocess.Popen) -> None:
    """Kill a process with its descendants, torchrun's ranks in sessions of their own among them,
    and wait until they are gone and have released the run folder."""
    descendants = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    children.kill(process)
    for each in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(descendants, timeout=60)


def _host(config: Config, number: int, log: Path) -> subprocess.Popen:
    options = ["--folder", config.run.folder, "--engines", "1", "--patience", "900"]
    # Every host has an address of its own, as on a network.
    address = ["--address", f"127.0.0.{2 + number}"]
    return children.start(
        [sys.executable, "-m", "megatron_r1.engines.fleet.host", *options, *address], log, QUIET
    )
