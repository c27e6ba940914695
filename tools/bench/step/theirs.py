"""TRL, started with the interpreter that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from .work import Work

WORKER = Path(__file__).with_name("peer_trl.py")
# As ours sets them: threads that wait do not take the other's core, nothing asks a network.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def version(python: str) -> str:
    """TRL's. Raises SystemExit where `python` has none, before anything long begins."""
    found = subprocess.run(
        [python, "-c", "from importlib import metadata; print(metadata.version('trl'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"{python} has no trl: {python} -m pip install -r requirements/bench.txt")
    return found.stdout.strip()


def run(work: Work, model: Path, questions: Path, steps: int, python: str) -> list[dict[str, Any]]:
    """A line for each step but the first. Raises RuntimeError with what it said."""
    done = subprocess.run(
        [python, str(WORKER), work.as_json(), str(model), str(questions), str(steps)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"TRL ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
