"""TRL, run by an interpreter that has it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tools.bench.children import environment
from tools.bench.step.work import Work


def version(python: str) -> str:
    """Return TRL's version; exit if `python` has no TRL, before anything long begins."""
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
    """Return one line per step but the first; raise RuntimeError with its standard error."""
    worker = [python, "-m", "tools.bench.step.peer_trl", work.as_json()]
    done = subprocess.run(
        [*worker, str(model), str(questions), str(steps)],
        env=environment(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"TRL ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
