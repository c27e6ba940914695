"""What is done to a run: each fault a function that breaks one thing once and says what it did.

A fault gets the scene and a source of chance; it returns None where what it breaks is not there
yet, to be tried again. What is stopped and goes on later is woken by the fault itself.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from .disk import fill, make_room, may_mount
from .roles import any_of, option
from .user import User

WHOLE = "step_" + "[0-9]" * 8
HOLD_SECONDS = 90.0
"""A disk stays full, or a stopped controller stopped, for at most so long."""


@dataclass
class Scene:
    """user: of the run; disk: the folder that can be filled, with the run's in it."""

    user: User
    disk: Path


Fault = Callable[[Scene, random.Random], str | None]
"""Says what was done, to whom; None: nothing, as there is nothing to break yet."""


def signal_to(find: str, number: signal.Signals) -> Fault:
    """Send a signal to one of the role's processes, and leave it at that."""

    def fault(scene: Scene, draw: random.Random) -> str | None:
        roles = scene.user.roles()
        process = any_of(getattr(roles, find), draw) if roles else None
        if process is None:
            return None
        process.send_signal(number)
        return f"{number.name} to process {process.pid}"

    return fault


def pause_of(find: str, seconds: tuple[float, float]) -> Fault:
    """SIGSTOP, and SIGCONT a while later."""

    def fault(scene: Scene, draw: random.Random) -> str | None:
        roles = scene.user.roles()
        process = any_of(getattr(roles, find), draw) if roles else None
        if process is None:
            return None
        pause = draw.uniform(*seconds)
        process.suspend()
        scene.user.follow(pause)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        return f"process {process.pid} stopped for {pause:.1f} s"

    return fault


def kill_controller(scene: Scene, draw: random.Random) -> str | None:
    """SIGKILL to the command itself."""
    if not scene.user.is_running:
        return None
    scene.user.process.kill()
    return f"SIGKILL to process {scene.user.process.pid}"


def pause_controller(scene: Scene, draw: random.Random) -> str | None:
    """A laptop's lid: the command stops, all that it started does not."""
    if not scene.user.is_running:
        return None
    process, pause = psutil.Process(scene.user.process.pid), draw.uniform(2, 12)
    process.suspend()
    scene.user.follow(pause)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()
    return f"stopped for {pause:.1f} s"


def stop_controller(scene: Scene, draw: random.Random) -> str | None:
    """It stops and never goes on; after a while somebody kills it, as it does not answer."""
    if not scene.user.is_running:
        return None
    process = scene.user.process
    process.send_signal(signal.SIGSTOP)
    scene.user.follow(draw.uniform(5, 15))
    process.kill()
    return "SIGSTOP, later SIGKILL"


def drop_engine_connections(scene: Scene, draw: random.Random) -> str | None:
    """The kernel resets every connection to one engine amid its answers."""
    roles = scene.user.roles()
    server = any_of(roles.engine_servers, draw) if roles else None
    if server is None:
        return None
    return _drop(int(option(server, "--port")), "engine")


def drop_trainer_connections(scene: Scene, draw: random.Random) -> str | None:
    """The kernel resets the connections between the controller and its ranks."""
    roles = scene.user.roles()
    rank = any_of(roles.trainer_ranks, draw) if roles else None
    if rank is None:
        return None
    return _drop(int(rank.cmdline()[-1].rpartition(":")[2]), "controller")


def _drop(port: int, whose: str) -> str | None:
    """Close all established connections to a local port. None where there were none."""
    chosen = ["state", "established", f"dport = :{port}"]
    done = subprocess.run(["ss", "-H", "-K", "-t", *chosen], capture_output=True, text=True)
    count = len(done.stdout.splitlines())
    return f"{count} connections to the {whose}'s port reset" if count else None


def fill_disk(scene: Scene, draw: random.Random) -> str | None:
    """No byte fits any more, until the command has ended; then there is room again."""
    if not scene.user.is_running:
        return None
    user = scene.user
    user.may_type = False
    fill(scene.disk)
    try:
        until = user.seconds + HOLD_SECONDS
        while user.is_running and user.seconds < until:
            user.follow(0.1)
    finally:
        make_room(scene.disk)
        user.may_type = True
    if user.is_running:
        return f"full for {HOLD_SECONDS:.0f} s, and it went on"
    last = user.ends[-1].said.splitlines() or ["nothing"]
    return f"full until it ended, saying: {last[-1].replace(str(user.run), 'RUN')}"


def corrupt_checkpoint(scene: Scene, draw: random.Random) -> str | None:
    """A byte of the newest checkpoint flips while nothing runs. There must be another to go back
    to: without one a run refuses to go on, rightly."""
    user = scene.user
    checkpoints = user.run / "checkpoints"
    if not user.is_running or len(list(checkpoints.glob(WHOLE))) < 2:
        return None
    user.may_type = False
    user.process.kill()
    try:
        user.follow(1.0)  # so long its ranks may take to end
        whole = sorted(checkpoints.glob(WHOLE))
        if len(whole) < 2:
            return None
        path = draw.choice(sorted(whole[-1].glob("*.distcp")))
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        return f"SIGKILL, then a bit of {whole[-1].name}/{path.name} flipped"
    finally:
        user.may_type = True


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
    """Those that can be done here, and what the others lack."""
    skipped = {}
    if not may_mount():
        skipped = dict.fromkeys(("disk full", *DROPS), "it takes root")
    elif shutil.which("ss") is None:
        skipped = dict.fromkeys(DROPS, "it takes `ss`, of iproute2")
    return [name for name in FAULTS if name not in skipped], skipped
