"""How long a recipe takes to start: when its processes come to which point, and the CPU they take.

The run has one step and a folder of its own. --dry-run measures that instead; --replace kills an
engine in the second step and measures until another one is back. --files counts the files that are
opened (with strace, which slows the run down). A run before the measured one, whose figures are not
printed, fills the page cache; --cold leaves it out."""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from megatron_r1.base.processes import timeline
from tools.bench import host
from tools.bench.step import critical_path

ROLES = {
    "fork_server megatron_r1.engines.plugin.serve": "import of vLLM",
    "fork_server megatron_r1.trainer.rank": "import of Megatron-Core",
    "engines.plugin.serve": "engine",
    "VLLM::": "engine",
    "trainer.rank": "trainer",
    "r1_grading.worker": "reward workers",
}
"""Part of a command line → role; the first that fits."""
BACK = "is back, with the current weights"
SAMPLE = "core/make outputs"
"""A span of the engine at whose end it has tokens."""
OPEN_PATTERN = re.compile(r'open(?:at)?\([^"]*"([^"]*)".* = (-?\d+)')


class Point(NamedTuple):
    """A point that a process has come to.

    Attributes:
        seconds: since the command.
        role: the role of the process.
        name: what it has come to.
        cpu: the processor time of the process."""

    seconds: float
    role: str
    name: str
    cpu: float


class Processes(threading.Thread):
    """CPU seconds of the processes below one, by role, read ten times a second."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root, self._role_seconds = psutil.Process(root), dict[int, tuple[str, float]]()

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            for process in [self._root, *self._root.children(recursive=True)]:
                role_and_seconds = role_of(process, self._root.pid)
                if role_and_seconds is not None:  # it has not ended
                    self._role_seconds[process.pid] = role_and_seconds
            time.sleep(0.1)

    def seconds_by_role(self) -> dict[str, float]:
        """Return the CPU seconds by role, the largest first."""
        seconds: dict[str, float] = defaultdict(float)
        for role, cpu_seconds in self._role_seconds.values():
            seconds[role] += cpu_seconds
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def role_of(process: psutil.Process, root: int) -> tuple[str, float] | None:
    """Return a process's role and its CPU seconds; None if it has ended."""
    try:
        words, times = " ".join(process.cmdline()), process.cpu_times()
    except psutil.Error:
        return None
    if not words:
        return None
    role = next((role for part, role in ROLES.items() if part in words), "others")
    return ("controller" if process.pid == root else role), times.user + times.system


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of `python tools/bench start`."""
    options.add_argument("recipe", type=Path)
    options.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as --KEY VALUE of rl")
    options.add_argument("--cold", action="store_true", help="no run before the measured one")
    kinds = options.add_mutually_exclusive_group()
    kinds.add_argument("--dry-run", action="store_true")
    kinds.add_argument("--replace", action="store_true")
    kinds.add_argument("--files", action="store_true")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return what a start takes."""
    with tempfile.TemporaryDirectory(prefix="r1_start_") as scratch:
        if not args.cold:
            measure(args, Path(scratch, "warm"))
        measurement = measure(args, Path(scratch, "run"))
    print(f"{'seconds':>8}  {'process':40} {'CPU s':>6}  point")
    for seconds, role, name, cpu in measurement["points"]:
        print(f"{seconds:8.2f}  {role:40} {cpu:6.2f}  {name}")
    print(f"\n{'CPU s':>8}  process")
    for role, seconds in measurement["cpu_seconds"].items():
        print(f"{seconds:8.2f}  {role}")
    print(f"{sum(measurement['cpu_seconds'].values()):8.2f}  in all")
    print(f"\nthe command ended after {measurement['seconds']:.1f} s")
    if args.replace:
        print(f"an engine was back {measurement['replaced_seconds']:.1f} s after its death")
    for name, row in measurement.get("files", {}).items():
        print(f"{name}: {row}")
    for line in measurement["stderr"]:
        print(f"on the screen, not of this project: {line}")
    return measurement


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the recipe once with its files in `folder`. Exits with its errors if it fails."""
    folder.mkdir()
    settings = dict(setting.split("=", 1) for setting in args.settings)
    steps = 3 if args.replace else 1
    settings |= {"run.folder": str(folder / "run"), "run.steps": settings.get("run.steps", steps)}
    command = host.megatron_r1("rl", args.recipe, settings)
    command += ["--dry-run"] if args.dry_run else []
    if args.files:
        syscalls = "trace=openat,open,execve"
        command = ["strace", "-ff", "-qq", "-e", syscalls, "-o", str(folder / "trace"), *command]
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=host.ROOT,
        env=host.environment(**{timeline.FOLDER_VARIABLE: str(folder / "timeline")}),
        stdout=subprocess.PIPE,
        stderr=open(folder / "stderr", "w"),
        text=True,
    ) as process:
        processes = Processes(process.pid)
        processes.start()
        assert process.stdout is not None
        replacement_seconds = follow(process.stdout, process.pid, args.replace)
        code = process.wait()
    end = time.monotonic()
    errors = (folder / "stderr").read_text().splitlines()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}:\n" + "\n".join(errors[-40:]))
    measurement: dict[str, Any] = {
        "points": timeline_points(folder / "timeline", start),
        "seconds": end - start,
        "cpu_seconds": processes.seconds_by_role(),
        "stderr": foreign_lines(errors),
    }
    if args.replace:
        measurement["replaced_seconds"] = replacement_seconds
    if args.files:
        measurement["files"] = opened_files(folder.glob("trace.*"))
    return measurement


def follow(lines: Iterable[str], root: int, replaces_engine: bool) -> float:
    """Read a run's output to its end; kill an engine at its first step, if asked to. Returns the
    seconds until another one was back, 0 without.

    Args:
        lines: the run's output.
        root: the process of the command.
        replaces_engine: whether an engine is killed at its first step."""
    death_time = return_time = 0.0
    for line in lines:
        if replaces_engine and not death_time and "step 1/" in line:
            death_time = time.monotonic()
            kill_engine(root)
        if BACK in line:
            return_time = time.monotonic()
    return return_time - death_time if return_time else 0.0


def kill_engine(root: int) -> None:
    """Kill the API server of an engine."""
    for process in psutil.Process(root).children(recursive=True):
        words = " ".join(process.cmdline())
        if "engines.plugin.serve" in words and "--port" in words:
            process.send_signal(signal.SIGKILL)
            return
    sys.exit("no engine of this host was found")


def timeline_points(folder: Path, start: float) -> list[Point]:
    """Return the points that the processes of a run have come to, in order of time; the first
    sampled token among them.

    Args:
        folder: the run's folder.
        start: the time at which the command was started."""
    points = []
    for process in critical_path.read_processes(folder):
        cpu = dict(process.cpu)
        for name, time_, _ in process.spans:
            kind, _, label = name.partition("/")
            if kind == timeline.POINT:
                role, _, point = label.rpartition("/")
                points.append(Point(time_ - start, role, point, cpu.get(time_, 0.0)))
        sample_ends = [span.end for span in process.spans if span.name == SAMPLE]
        if sample_ends:
            points.append(
                Point(
                    min(sample_ends) - start,
                    "engine",
                    "first sampled token",
                    critical_path.cpu_seconds(process, process.cpu[0][0], min(sample_ends)),
                )
            )
    return sorted(points)


def opened_files(traces: Iterable[Path]) -> dict[str, str]:
    """Return how many files each kind of process opened, how often in vain, and the bytes of the
    different files, from strace's files, one a process. A fork counts for its own opens only."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    files: dict[str, set[str]] = defaultdict(set)
    for path in traces:
        text = path.read_text(errors="replace")
        role = next((role for part, role in ROLES.items() if words_in(text, part)), "controller")
        for name, result in OPEN_PATTERN.findall(text):
            counts[role]["opened" if int(result) >= 0 else "not found"] += 1
            if int(result) >= 0:
                files[role].add(name)
    rows = {}
    for role, count in counts.items():
        size = sum(os.path.getsize(name) for name in files[role] if os.path.isfile(name))
        rows[role] = (
            f"{count['opened']:,} opens of {len(files[role]):,} files of {size / 2**20:,.0f} MiB, "
            f"{count['not found']:,} not found"
        )
    return rows


def words_in(trace: str, part: str) -> bool:
    """Return whether the command that a trace begins with has the words of `part`."""
    first = trace.partition("\n")[0]
    return "execve" in first and all(f'"{w}' in first or w in first for w in part.split())


def foreign_lines(lines: Sequence[str]) -> list[str]:
    """Return the lines of standard error that are not this command's own."""
    return [line for line in lines if line.strip() and not line.startswith("megatron-r1")]
