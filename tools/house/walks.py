"""The files that a thing passes through in a run, traced in all its processes: with whatever else
these do in that time. The run needs the model of `make demo`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.house.structure import PACKAGES

WALKS = {
    "a response, from the engine's reply to the loss": (
        "EngineClient.generate.<locals>.read",
        "algorithms/grpo.py loss",
    ),
    "a reward, from the response to its advantage": ("ResponseGrader.grade", "advantages"),
    "a weight, from the update to the engines' proof": (
        "PolicyEngines.push",
        "Session.finish_step",
    ),
}
"""Of each walk the functions with which it begins and ends: the end of "file name"."""
RUN = ("rl", "examples/laptop/r1_zero.yaml", "--run.steps", "1")


def walks(root: Path) -> str:
    """Run one step of the laptop recipe; return the number of files of each walk, and the files in
    the order in which they are entered."""
    with tempfile.TemporaryDirectory() as folder:
        entered = traced(root, Path(folder))
    lines = []
    for walk, (start, end) in WALKS.items():
        files = stops(entered, start, end)
        lines += ["", f"{walk}: {len(files)} files", *(f"  {file}" for file in files)]
    return "\n".join(lines)


def traced(root: Path, folder: Path) -> list[tuple[int, str, str]]:
    """Run the command; return what its processes entered: (nanoseconds, file, function)."""
    notes = folder / "notes"
    notes.mkdir()
    roots = os.pathsep.join(f"{root}/{package}" for package in PACKAGES)
    variables = {
        "HOUSE_TRACE": str(notes),
        "HOUSE_ROOTS": roots,
        "PYTHONPATH": str(Path(__file__).parent / "traced"),
    }
    command = [sys.executable, "-m", "megatron_r1", *RUN, "--run.folder", str(folder / "run")]
    subprocess.run(command, cwd=root, env=os.environ | variables, check=True, stdout=sys.stderr)
    entered = []
    for each in notes.iterdir():
        for line in each.read_text(encoding="utf-8").splitlines():
            time, file, function = line.split(" ", 2)
            entered.append((int(time), str(Path(file).relative_to(root)), function))
    return sorted(entered)


def stops(entered: list[tuple[int, str, str]], start: str, end: str) -> list[str]:
    """Return the distinct files that are entered from the first `start` to the next `end`."""
    files: dict[str, None] = {}
    for _, file, function in entered:
        if files or f"{file} {function}".endswith(start):
            files[file] = None
            if f"{file} {function}".endswith(end):
                return list(files)
    raise ValueError(f"the run did not pass from {start} to {end}")
