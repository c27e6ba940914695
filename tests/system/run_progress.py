"""Waiting for what a run does while it goes on."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest


def wait_for(process: subprocess.Popen, what: str, is_so) -> None:
    while not is_so():
        if process.poll() is not None:
            pytest.fail(f"ended before {what}: {process.communicate()}")
        time.sleep(0.002)


def left_behind(folder: Path) -> list[int]:
    """Processes that still write to the run's logs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            output = os.readlink(entry / "fd/1")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if output.startswith(str(folder / "logs")) and state != "Z":
            found.append(int(entry.name))
    return found


def lines(path: Path) -> list[dict]:
    """Return the whole lines of a file of JSON. str.splitlines() would also split at U+0085, which
    a response of a random model may have."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line.endswith("}")]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    wait_for(process, f"at step {step}", lambda: any(m["step"] >= step for m in lines(metrics)))
