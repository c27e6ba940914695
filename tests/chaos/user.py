"""A simulated user, who restarts the same command whenever it ends, reads the metrics, and finds
the processes of the run from outside, as `ps` finds them."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.base.processes.children import die_with_parent
from megatron_r1.controller.rollouts.group_records import CommitRecord, decode
from tools.bench.host import environment

POLL_SECONDS = 0.02
ROLES = {
    "trainer ranks": ("trainer_", True),
    "engine servers": ("engine-", True),
    "engine cores": ("engine-", False),
}
"""The beginning of the name of a role's log, and whether its processes lead their sessions. Engine
cores hold the weights and generate; a server forks them, and vLLM names them."""
PATIENCE = 4
"""The number of times in a row that the command may end without a new step."""


@dataclass
class Sighting:
    """A line of metrics.jsonl when it first appeared. start: index of the command, from 0."""

    line: dict[str, Any]
    seconds: float
    start: int


@dataclass
class End:
    """The end of a command. kept: finished groups in the sample log, by step."""

    seconds: float
    status: int
    stderr: str
    kept: dict[int, int]


@dataclass
class User:
    """Restarts `command` while `follow` is called.

    run: the run's folder; logs: a folder for the output of each command, on a disk that is not
    filled; seconds count from the construction."""

    command: list[str]
    run: Path
    logs: Path
    sightings: list[Sighting] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    best: int = 0
    """The highest step finished so far."""
    is_done: bool = False
    may_start: bool = True
    """False while a fault needs the command not to run."""

    def __post_init__(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        self._seen: dict[int, str] = {}
        self._mark: tuple[int, int] | None = None
        self._best_at_start = [-1] * PATIENCE
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def any_process(self, role: str, draw: random.Random) -> psutil.Process | None:
        """Return a random process of one of ROLES, or the "controller", which is the command.

        None while the role starts or the command does not run."""
        if self.process is None or not self.is_running:
            return None
        controller = psutil.Process(self.process.pid)
        if role == "controller":
            return controller
        prefix, leads = ROLES[role]
        found = []
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for process in controller.children(recursive=True):
                name = _log_name(process, self.run / "logs")
                if not name.startswith(prefix):
                    continue
                is_leader = os.getsid(process.pid) == process.pid
                if leads if is_leader else not leads and process.name().startswith("VLLM::"):
                    found.append((name, process.pid, process))
        return draw.choice(sorted(found))[2] if found else None

    def follow(self, seconds: float = 0.0) -> None:
        """Read metrics and restart for `seconds`; raise RuntimeError without progress."""
        until = time.monotonic() + seconds
        while True:
            self._read()
            if not self.is_running:
                self._note_end()
                if not self.is_done and self.may_start:
                    self._start()
            if time.monotonic() >= until or self.is_done:
                return
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _start(self) -> None:
        self._best_at_start.append(self.best)
        if self._best_at_start[-PATIENCE - 1] == self.best:
            stderr = "\n---\n".join(end.stderr[-3000:] for end in self.ends[-PATIENCE:])
            raise RuntimeError(f"started {PATIENCE} times without a new step:\n{stderr}")
        with open(self._log("out"), "wb") as output, open(self._log("err"), "wb") as errors:
            self.process = subprocess.Popen(
                self.command,
                env=environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                preexec_fn=die_with_parent,  # if the bench itself is killed
            )

    def _note_end(self) -> None:
        if self.process is None:
            return
        status = self.process.wait()
        stderr = self._log("err").read_text(errors="replace").strip()
        self.process = None
        self.ends.append(End(self.seconds, status, stderr, kept_groups(self.run / "sample_log")))
        self.is_done = status == 0

    def _log(self, kind: str) -> Path:
        return self.logs / f"command_{len(self.ends)}.{kind}"

    def _read(self) -> None:
        path = self.run / "metrics.jsonl"
        try:
            found = path.stat()
        except FileNotFoundError:
            return
        before, self._mark = self._mark, (found.st_size, found.st_mtime_ns)
        if self._mark == before:
            return
        text = path.read_text(errors="replace")
        for raw in text[: text.rfind("\n") + 1].splitlines():
            line = json.loads(raw)
            step = line["step"]
            if self._seen.get(step) != raw:
                self._seen[step] = raw
                self.sightings.append(Sighting(line, self.seconds, len(self.ends)))
                self.best = max(self.best, step)


def _log_name(process: psutil.Process, folder: Path) -> str:
    """Return the name of the log in `folder` that is its standard output, or ""."""
    try:
        output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
    except OSError:
        return ""
    return output.name if output.parent == folder else ""


def kept_groups(log: Path) -> dict[int, int]:
    """Return the number of whole groups on disk by step; reading cuts a torn end off, so copies are
    read."""
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(log.glob("step_*.log")):
            copy = shutil.copy(path, folder)
            records = map(decode, FramedFile.read(Path(copy)))
            kept[int(path.stem[5:])] = sum(not isinstance(r, CommitRecord) for r in records)
    return kept
