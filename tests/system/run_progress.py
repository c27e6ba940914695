"""Waiting for what a run does while it goes on."""

import json
import subprocess
import time
from pathlib import Path

import pytest


def wait_for(process: subprocess.Popen, what: str, is_so) -> None:
    while not is_so():
        if process.poll() is not None:
            pytest.fail(f"ended before {what}: {process.communicate()}")
        time.sleep(0.002)


def lines(path: Path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    wait_for(process, f"at step {step}", lambda: any(m["step"] >= step for m in lines(metrics)))
