"""The faults: each is a function that breaks one thing once and returns what it did, in words.

It gets the scene and a random generator. It returns None if its target does not exist yet; it is
then tried again. A fault that stops a process for a while also resumes it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.bench.chaos.user import User

CHECKPOINT = "step_" + "[0-9]" * 8
"""Excludes those set aside as damaged."""
HOLD_SECONDS = 90.0
"""Longest time for which the disk stays full."""
BALLAST = "ballast"
CHUNK = 64 * 1024


@dataclass
class Scene:
    """user: starts the run; disk: a folder that can be filled, with the run's folder in it."""

    user: User
    disk: Path


Fault = Callable[[Scene, random.Random], str | None]
"""Returns what was done to which process; None if there is nothing to break yet."""


def signal_to(find: str, number: signal.Signals) -> Fault:
    """Return the fault that signals one process of a role. find: a method of Roles."""

    def fault(scene: Scene, draw: random.Random) -> str | None:
        process = scene.user.any_process(find, draw)
        if process is None:
            return None
        process.send_signal(number)
        return f"{number.name} to process {process.pid}"

    return fault


def pause_of(find: str, seconds: tuple[float, float]) -> Fault:
    """Return the fault that stops one process of a role for a while."""

    def fault(scene: Scene, draw: random.Random) -> str | None:
        process = scene.user.any_process(find, draw)
        if process is None:
            return None
        pause = _pause(scene, process, draw.uniform(*seconds))
        return f"process {process.pid} {pause}"

    return fault


def _pause(scene: Scene, process: psutil.Process, seconds: float) -> str:
    process.suspend()
    scene.user.follow(seconds)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()
    return f"stopped for {seconds:.1f} s"


def kill_controller(scene: Scene, draw: random.Random) -> str | None:
    """Send SIGKILL to the command itself."""
    if not scene.user.is_running:
        return None
    scene.user.process.kill()
    return f"SIGKILL to process {scene.user.process.pid}"


def pause_controller(scene: Scene, draw: random.Random) -> str | None:
    """Stop the command for a while, but not the processes that it started."""
    if not scene.user.is_running:
        return None
    return _pause(scene, psutil.Process(scene.user.process.pid), draw.uniform(2, 12))


def stop_controller(scene: Scene, draw: random.Random) -> str | None:
    """Stop the command for good; kill it after a while, as a user would."""
    if not scene.user.is_running:
        return None
    process = scene.user.process
    process.send_signal(signal.SIGSTOP)
    scene.user.follow(draw.uniform(5, 15))
    process.kill()
    return "SIGSTOP, later SIGKILL"


def drop_engine_connections(scene: Scene, draw: random.Random) -> str | None:
    """Let the kernel reset every connection to one engine in the middle of its responses."""
    server = scene.user.any_process("engine_servers", draw)
    if server is None:
        return None
    line = server.cmdline()
    return _drop(int(line[line.index("--port") + 1]), "engine")


def drop_trainer_connections(scene: Scene, draw: random.Random) -> str | None:
    """Let the kernel reset the connections between the controller and its ranks."""
    rank = scene.user.any_process("trainer_ranks", draw)
    if rank is None:
        return None
    return _drop(int(rank.cmdline()[-1].rpartition(":")[2]), "controller")


def _drop(port: int, whose: str) -> str | None:
    """Close all established connections to a local port; return None if there were none."""
    chosen = ["state", "established", f"dport = :{port}"]
    done = subprocess.run(["ss", "-H", "-K", "-t", *chosen], capture_output=True, text=True)
    count = len(done.stdout.splitlines())
    return f"{count} connections to the {whose}'s port reset" if count else None


def fill_disk(scene: Scene, draw: random.Random) -> str | None:
    """Fill the disk to the last byte until the command has ended, then make room again."""
    if not scene.user.is_running:
        return None
    user = scene.user
    user.may_start = False
    _fill(scene.disk)
    try:
        until = user.seconds + HOLD_SECONDS
        while user.is_running and user.seconds < until:
            user.follow(0.1)
    finally:
        (scene.disk / BALLAST).unlink(missing_ok=True)
        user.may_start = True
    if user.is_running:
        return f"full for {HOLD_SECONDS:.0f} s, and it went on"
    last = user.ends[-1].stderr.splitlines() or ["nothing"]
    return f"full until it ended, saying: {last[-1].replace(str(user.run), 'RUN')}"


def corrupt_checkpoint(scene: Scene, draw: random.Random) -> str | None:
    """Flip a bit of the newest checkpoint while the command is not running.

    An older checkpoint must exist: without one a run rightly refuses to continue.
    """
    user = scene.user
    checkpoints = user.run / "checkpoints"
    if not user.is_running or len(list(checkpoints.glob(CHECKPOINT))) < 2:
        return None
    user.may_start = False
    user.process.kill()
    try:
        user.follow(1.0)  # time for its ranks to end
        whole = sorted(checkpoints.glob(CHECKPOINT))
        if len(whole) < 2:
            return None
        path = draw.choice(sorted(whole[-1].glob("*.distcp")))
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        return f"SIGKILL, then a bit of {whole[-1].name}/{path.name} flipped"
    finally:
        user.may_start = True


FAULTS: dict[str, Fault] = {
    "engine core killed": signal_to("engine_cores", signal.SIGKILL),
    "engine server killed": signal_to("engine_servers", signal.SIGKILL),
    "engine core stopped for good": signal_to("engine_cores", signal.SIGSTOP),
    "engine core stopped for a while": pause_of("engine_cores", (2, 10)),
    "trainer rank killed": signal_to("trainer_ranks", signal.SIGKILL),
    "trainer rank stopped for good": signal_to("trainer_ranks", signal.SIGSTOP),
    "trainer rank stopped for a while": pause_of("trainer_ranks", (2, 10)),
    "controller killed": kill_controller,
    "controller stopped for a while": pause_controller,
    "controller stopped for good": stop_controller,
    "engine's connections dropped": drop_engine_connections,
    "trainer's connections dropped": drop_trainer_connections,
    "disk full": fill_disk,
    "checkpoint corrupted": corrupt_checkpoint,
}
DROPS = ("engine's connections dropped", "trainer's connections dropped")


def possible() -> tuple[list[str], dict[str, str]]:
    """Return the faults possible on this machine, and why the others are not."""
    skipped = {}
    if os.geteuid() != 0:
        skipped = dict.fromkeys(("disk full", *DROPS), "needs root")
    elif shutil.which("ss") is None:
        skipped = dict.fromkeys(DROPS, "needs `ss`, of iproute2")
    return [name for name in FAULTS if name not in skipped], skipped


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Yield `folder` as an empty tmpfs of this size; without root, as a plain folder."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        yield folder
        return
    size = f"size={mebibytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _fill(folder: Path) -> None:
    """Write a file until not one byte more fits."""
    descriptor = os.open(folder / BALLAST, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size = CHUNK
    while size:
        try:
            os.write(descriptor, b"\0" * size)
        except OSError:
            size //= 2
    os.close(descriptor)
