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

QUIET_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONWARNINGS": "ignore",
}
"""More processes than cores: threads that spin would take the cores of those that compute."""


def rehearsal_command(
    verb: str, recipe: Path, config: Config, settings: Sequence[str]
) -> list[str]:
    """Return the command of a verb: with ranks as torchrun starts them where it has several.

    Args:
        verb: the subcommand of megatron-r1.
        recipe: the recipe's file.
        config: the recipe as read, with `settings`.
        settings: dotted settings of the command line, KEY=VALUE each."""
    python = [sys.executable, "-u", "-m"]
    world_size = config.parallel.processes
    arguments = ["megatron_r1", verb, str(recipe), *settings]
    if verb == "sample" or world_size == 1:
        return [*python, *arguments]
    logs = str(Path(config.run.folder) / "logs" / "ranks")
    if not gpu.is_usable():
        return [*python, "megatron_r1.rehearse.forked_ranks", str(world_size), logs, *arguments[1:]]
    # A process that has asked for GPUs must not be forked.
    torchrun = ["--standalone", "--nproc-per-node", str(world_size), "--log-dir", logs]
    torchrun += ["--redirects", "3", "--tee", "0:3"]
    return [*python, "torch.distributed.run", *torchrun, "-m", *arguments]


@contextlib.contextmanager
def running_command(
    verb: str, recipe: Path, config: Config, settings: Sequence[str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a verb for the block, with engine hosts if its recipe has them; kill all its processes at
    the end, by SIGKILL, with those that they have started.

    Args:
        verb: the subcommand of megatron-r1.
        recipe: the recipe's file.
        config: the recipe as read, with `settings`.
        settings: dotted settings of the command line, KEY=VALUE each.
        log: the file for the verb's output; hosts write to host-N.log next to it.

    Yields:
        The process of the verb."""
    processes = []
    try:
        trainer_variables, host_variables = gpu_environments(verb, config)
        for number, gpu_variables in enumerate(host_variables):
            processes.append(
                _start_host(config, number, log.with_name(f"host-{number}.log"), gpu_variables)
            )
        environment = QUIET_ENVIRONMENT | trainer_variables
        main = children.start(rehearsal_command(verb, recipe, config, settings), log, environment)
        processes.insert(0, main)
        yield main
    finally:
        for process in processes:
            _kill_all(process)


def cpu_seconds() -> float:
    """Return the CPU seconds that all descendants of this process have taken until now."""
    own_times = os.times()
    total = own_times.children_user + own_times.children_system  # of those that have ended
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def gpu_environments(verb: str, config: Config) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the GPU variables of the trainer and of each engine host, which share this machine's
    GPUs: each host has its own, or the trainer's where engines are colocated.

    Args:
        verb: the recipe's verb.
        config: the settings of the run.
    """
    rollout = config.rollout
    if rollout.placement != "hosts" or verb not in ("rl", "sample"):
        return {}, []
    hosts = rollout.engines * rollout.hosts_per_engine
    if not gpu.is_usable():
        return {}, [{}] * hosts
    visible = gpu.visible_gpus(os.environ)
    ranks = (
        rollout.tensor_parallel
        * rollout.pipeline_parallel
        * rollout.data_parallel
        // rollout.hosts_per_engine
    )
    shared = rollout.colocated or verb == "sample"
    first = 0 if shared else len(visible) - hosts * ranks
    gpus_by_host = [visible[first + i * ranks : first + (i + 1) * ranks] for i in range(hosts)]
    trainer_gpus = visible if shared else visible[:first]
    return _gpu_variables(trainer_gpus), [_gpu_variables(gpus) for gpus in gpus_by_host]


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its descendants, torchrun's ranks in sessions of their own among them,
    and wait until they are gone and have released the run folder."""
    descendants = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    children.kill(process)
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    psutil.wait_procs(descendants, timeout=60)


def _gpu_variables(gpus: Sequence[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def _start_host(
    config: Config, number: int, log: Path, gpu_variables: dict[str, str]
) -> subprocess.Popen[bytes]:
    options = ["--folder", config.run.folder, "--engines", "1", "--patience", "900"]
    # Every host has an address of its own, as on a network.
    address = ["--address", f"127.0.0.{2 + number}"]
    return children.start(
        [sys.executable, "-m", "megatron_r1.engines.fleet.host", *options, *address],
        log,
        QUIET_ENVIRONMENT | gpu_variables,
    )
