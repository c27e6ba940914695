"""TRL, run by an interpreter that has it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tools.bench.children import run_to_end
from tools.bench.step.work import Work


def version(python: str) -> str:
    """Return TRL's version; exit if `python` has no TRL, before anything long begins."""
    code = "from importlib import metadata; print(metadata.version('trl'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{python} has no trl: {python} -m pip install -r requirements/bench.txt")
    return found.stdout.strip()


def run(work: Work, model: Path, questions: Path, steps: int, python: str) -> list[dict[str, Any]]:
    """Return one line per step but the first."""
    worker = [python, "-m", "tools.bench.step.peer_trl", work.as_json()]
    command = [*worker, str(model), str(questions), str(steps)]
    output = run_to_end(command, HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]
