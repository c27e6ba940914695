"""The base model of examples/agents, trained for a part of its steps."""

import json
import subprocess
import sys
from pathlib import Path

from command_line import run

ROOT = Path(__file__).parents[2]


def write_base(folder: Path) -> None:
    """Write rows, and a base model that knows the form of a call, as `base/hf`."""
    subprocess.run(
        [sys.executable, "-m", "examples.agents.make_lookup", folder], check=True, cwd=ROOT
    )
    data = ("--sft.data", folder / "demonstrations.jsonl", "--model.path", folder / "model")
    where = ("--run.folder", folder / "base", "--run.steps", 150)
    done = run("sft", ROOT / "examples/agents/base.yaml", *data, *where)
    assert done.returncode == 0, done.stderr + done.stdout


def lines(path: Path) -> list[dict]:
    """Return the whole lines of a file of JSON; an empty list if there is none."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line.endswith("}")]
