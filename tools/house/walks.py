"""The files that a response, a reward and a weight pass through in one step of a run.

A walk of a response or a reward has each function that is given the thing, or something made from
it, and hands it on: by returning it or what it makes from it, to a function that receives it, or by
sending it; with its direct caller. A weight's walk has what is called, at any depth and in tasks
that begin there, within the calls of `Walk.within`. A message to another process is followed to the
function that `within` or `receivers` names there; left out are the files of vLLM, Megatron and
torch, functions that only record or check what they are given or keep it in an object (metrics,
logs and log-probabilities under π_ref), what another walk has (`outside`), and all that the run
does meanwhile for another purpose."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.house.structure import PACKAGES


@dataclass
class Walk:
    """One thing's way; functions are named by the end of "file qualified.name".

    Attributes:
        name: how the table names it.
        begin: its first function; the walk is what is entered from there to `end`.
        end: its last function.
        within: calls all of whose inner calls count.
        receivers: functions whose arguments are the thing.
        follows: whether it is followed by value: results of functions of the walk are made from the
            thing."""

    name: str
    begin: str
    end: str
    within: list[str]
    receivers: list[str]
    follows: bool
    hands_over: list[str] = field(default_factory=list)
    """Functions that send the thing elsewhere: they and those around them hand it on."""
    outside: list[str] = field(default_factory=list)
    """Calls that are another walk's: what they call does not count."""


SAMPLER_START = "StepSampler.open"
"""The walks begin after this call: held-out questions of the untrained model come before."""
WALKS = [
    Walk(
        "a response, from the engine's reply to the loss",
        "EngineClient.generate.<locals>.read",
        "algorithms/grpo.py loss",
        ["EngineClient.generate.<locals>.read", "trainer/sample_encoding.py decode_samples"],
        [],
        follows=True,
        hands_over=["RankSocket.send"],
        outside=["ResponseGrader.grade"],
    ),
    Walk(
        "a reward, from the response to its advantage",
        "ResponseGrader.grade",
        "algorithms/grpo.py advantages",
        [],
        ["ResponseGrader.grade", "r1_grading/worker.py _grade_job"],
        follows=True,
        hands_over=["FramedProcess.send", "RewardPool._set_grade"],
    ),
    Walk(
        "a weight, from the update to the engines' proof",
        "PolicyEngines.push",
        "RLRun.finish_step",
        [
            "PolicyEngines.push",
            "RankPush.send_weights",
            "_SenderProgress.check",
            "plugin/weight_swap.py swap_weights",
            "PushTransferEngine.start_weight_update",
            "PushTransferEngine.receive_weights",
            "PushTransferEngine.finish_weight_update",
        ],
        [],
        follows=False,
    ),
]
RUN = ("rl", "examples/laptop/r1_zero.yaml", "--run.steps", "1")
Entry = tuple[int, str, str, str]
"""Nanoseconds, walk or "mark", file, function."""


def walks(root: Path, settings: list[str]) -> str:
    """Run one step of the laptop recipe with further `settings`; return the number of files of each
    walk, and the files in the order in which they are entered."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "megatron_r1", *RUN, "--run.folder", f"{folder}/run", *settings]
        entries = trace_run(root, Path(folder), arguments, WALKS, SAMPLER_START)
    lines = []
    for walk in WALKS:
        files = walk_files(entries, walk, SAMPLER_START)
        lines += ["", f"{walk.name}: {len(files)} files", *(f"  {file}" for file in files)]
    return "\n".join(lines)


def trace_run(
    root: Path, folder: Path, arguments: list[str], walks: list[Walk], start_call: str
) -> list[Entry]:
    """Run Python with `arguments`; return what its processes noted, by time.

    Args:
        root: the repository.
        folder: the folder for what is noted.
        arguments: Python's.
        walks: the walks to note.
        start_call: the call after which they begin."""
    notes = folder / "notes"
    notes.mkdir()
    package_parents = dict.fromkeys(str((root / package).parent) for package in PACKAGES)
    variables = {
        "HOUSE_TRACE": str(notes),
        "HOUSE_ROOTS": os.pathsep.join(f"{root}/{package}/" for package in PACKAGES),
        "HOUSE_WALKS": json.dumps({"after": start_call, "walks": [asdict(walk) for walk in walks]}),
        # This tree first, also where another checkout is installed.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "traced"), *package_parents]),
    }
    command = [sys.executable, *arguments]
    subprocess.run(command, cwd=root, env=os.environ | variables, check=True, stdout=sys.stderr)
    entries = []
    for note in notes.iterdir():
        for line in note.read_text(encoding="utf-8").splitlines():
            time, walk, title = line.split("|", 2)
            file, function = title.split(" ", 1)
            entries.append((int(time), walk, str(Path(file).relative_to(root)), function))
    return sorted(entries)


def walk_files(entries: list[Entry], walk: Walk, start_call: str) -> list[str]:
    """Return the distinct files of a walk from its first `begin` after `start_call` to the next
    `end`, in the order in which they are entered.

    Args:
        entries: what the processes noted, by time.
        walk: the walk to list.
        start_call: the call after which it begins."""

    def first(name: str, start_time: int) -> int:
        for time, kind, file, function in entries:
            if kind == "mark" and time >= start_time and f"{file} {function}".endswith(name):
                return time
        raise ValueError(f"the run did not pass from {walk.begin} to {walk.end}: no {name}")

    start = first(walk.begin, first(start_call, 0))
    end = first(walk.end, start)
    files = [file for time, name, file, _ in entries if name == walk.name and start <= time <= end]
    return list(dict.fromkeys(files))
