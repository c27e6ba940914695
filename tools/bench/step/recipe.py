"""The phases of a recipe's steps: run it for a few and report the median of each.

The first step of a run pays for warming up and is left out. The model is the given one if it has
weights, else a random one of the same shape (its answers are long and wrong: a worst case).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[3]
PHASES = ("time/rollout", "time/reward", "time/train", "time/push", "time/step")
SHOWN = ("tokens_per_second", "response_length/mean", "logprob_diff/mean", "logprob_diff/max")


def run(chosen: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Medians over the steps after the first, by metric name."""
    with tempfile.TemporaryDirectory() as folder:
        model = chosen.model
        if not list(Path(model).glob("*.safetensors")):
            model = _random_model(chosen.model, Path(folder))
        settings = {
            "run.folder": f"{folder}/rl",
            "run.steps": chosen.steps + 1,
            "model.path": model,
            "data.num_heldout": 0,
        }
        _megatron_r1("rl", chosen.recipe, settings)
        text = Path(folder, "rl/metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()][1:]
    medians = {name: median(line[name] for line in lines) for name in (*PHASES, *SHOWN)}
    print(f"median of {len(lines)} steps of {chosen.recipe} on {cores} cores")
    for name, value in medians.items():
        share = f"{value / medians['time/step']:6.1%}" if name in PHASES else ""
        print(f"  {name:24} {value:12.4g}  {share}")
    return {"steps": len(lines), "recipe": Path(chosen.recipe).name, "medians": medians}


def _random_model(shape: str, folder: Path) -> str:
    example = folder / "one.jsonl"
    example.write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n")
    settings = {
        "run.folder": f"{folder}/base",
        "run.steps": 1,
        "model.path": shape,
        "model.init": "random",
        "model.dtype": "float32",
        "sft.data": str(example),
        "sft.batch_size": 1,
    }
    (folder / "empty.yaml").write_text("{}")
    _megatron_r1("sft", str(folder / "empty.yaml"), settings)
    return f"{folder}/base/hf"


def _megatron_r1(verb: str, recipe: str, settings: dict[str, Any]) -> None:
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "megatron_r1", verb, recipe, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
