"""The corpus of the demo's base model, as a function of a pipeline's `make` stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def write(folder: Path, seed: int) -> None:
    """Write base.jsonl as `python -m examples.laptop.demo --seed SEED` does."""
    out = str(Path(folder) / "base.jsonl")
    command = [sys.executable, "-m", "examples.laptop.make_corpus", out, "--seed", str(seed)]
    subprocess.run(command, check=True)
