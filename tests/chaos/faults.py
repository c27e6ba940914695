"""The faults: each is a function that breaks one thing once and returns what it did, in words.

It returns None if its target does not exist yet; it is then tried again. A fault that stops a
process for a while also resumes it."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.chaos.user import User

CHECKPOINT = "step_" + "[0-9]" * 8
"""Excludes those set aside as damaged."""
HOLD_SECONDS = 90.0
"""Longest time for which the disk stays full."""


Fault = Callable[[User, random.Random], str | None]
"""Returns what was done to which process; None if there is nothing to break yet. Called while the
command is running."""


def signal_to(role: str, number: signal.Signals) -> Fault:
    """Return the fault that signals one process of a role."""

    def fault(user: User, draw: random.Random) -> str | None:
        if (process := user.any_process(role, draw)) is None:
            return None
        process.send_signal(number)
        return f"{number.name} to process {process.pid}"

    return fault


def pause_of(role: str, least: float, most: float) -> Fault:
    """Return the fault that stops one process of a role for a while."""

    def fault(user: User, draw: random.Random) -> str | None:
        if (process := user.any_process(role, draw)) is None:
            return None
        seconds = draw.uniform(least, most)
        process.suspend()
        user.follow(seconds)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        return f"process {process.pid} stopped for {seconds:.1f} s"

    return fault


def stop_controller(user: User, draw: random.Random) -> str:
    """Stop the command for good; kill it after a while, as a user would."""
    process = user.process
    assert process, "the command is running"
    process.send_signal(signal.SIGSTOP)
    user.follow(draw.uniform(5, 15))
    process.kill()
    return "SIGSTOP, later SIGKILL"


def drop_engine_connections(user: User, draw: random.Random) -> str | None:
    """Let the kernel reset every connection to one engine in the middle of its responses."""
    if (server := user.any_process("engine servers", draw)) is None:
        return None
    words = " ".join(server.cmdline()).split()  # a forked process has one word
    return _drop(int(words[words.index("--port") + 1]), "engine")


def drop_trainer_connections(user: User, draw: random.Random) -> str | None:
    """Let the kernel reset the connections between the controller and its ranks."""
    if (rank := user.any_process("trainer ranks", draw)) is None:
        return None
    words = " ".join(rank.cmdline()).split()
    address = words[words.index("megatron_r1.trainer.rank") + 1]
    return _drop(int(address.rpartition(":")[2]), "controller")


def _drop(port: int, whose: str) -> str | None:
    """Close all established connections to a local port; return None if there were none."""
    chosen = ["state", "established", f"dport = :{port}"]
    done = subprocess.run(["ss", "-H", "-K", "-t", *chosen], capture_output=True, text=True)
    count = len(done.stdout.splitlines())
    return f"{count} connections to the {whose}'s port reset" if count else None


def fill_disk(user: User, draw: random.Random) -> str:
    """Fill the run's disk to the last byte until the command has ended, then make room again."""
    user.may_start = False
    ballast = user.run.parent / "ballast"
    _fill(ballast)
    try:
        until = user.seconds + HOLD_SECONDS
        while user.is_running and user.seconds < until:
            user.follow(0.1)
    finally:
        ballast.unlink(missing_ok=True)
        user.may_start = True
    if user.is_running:
        return f"full for {HOLD_SECONDS:.0f} s, and it went on"
    last = user.ends[-1].stderr.splitlines() or ["nothing"]
    return f"full until it ended, saying: {last[-1].replace(str(user.run), 'RUN')}"


def corrupt_checkpoint(user: User, draw: random.Random) -> str | None:
    """Flip a bit of the newest checkpoint while the command is not running.

    An older checkpoint must exist: without one a run rightly refuses to continue."""
    checkpoints = user.run / "checkpoints"
    if len(list(checkpoints.glob(CHECKPOINT))) < 2:
        return None
    assert user.process, "the command is running"
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
    "engine core killed": signal_to("engine cores", signal.SIGKILL),
    "engine server killed": signal_to("engine servers", signal.SIGKILL),
    "engine core stopped for good": signal_to("engine cores", signal.SIGSTOP),
    "engine core stopped for a while": pause_of("engine cores", 2, 10),
    "trainer rank killed": signal_to("trainer ranks", signal.SIGKILL),
    "trainer rank stopped for good": signal_to("trainer ranks", signal.SIGSTOP),
    "trainer rank stopped for a while": pause_of("trainer ranks", 2, 10),
    "controller killed": signal_to("controller", signal.SIGKILL),
    "controller stopped for a while": pause_of("controller", 2, 12),
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


def _fill(path: Path) -> None:
    """Write a file until not one byte more fits."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size = 64 * 1024
    while size:
        try:
            os.write(descriptor, b"\0" * size)
        except OSError:
            size //= 2
    os.close(descriptor)
