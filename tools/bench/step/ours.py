"""megatron-r1 as a person runs it: a recipe on the command line, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from .work import Work

HERE = Path(__file__).parent
POLL_SECONDS = 0.002


def recipe(
    work: Work, model: Path, questions: Path, folder: Path, steps: int, more: dict[str, dict]
) -> dict[str, dict[str, Any]]:
    """What differs from the defaults, with `more` settings by section. A checkpoint after the last
    step only: TRL writes none."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder), "steps": steps},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(questions), "num_heldout": 0, "template": "{problem}"},
        "rollout": {
            "max_response_tokens": work.limit,
            "temperature": work.temperature,
            "dtype": "float32",
            "max_num_seqs": work.answers,
        },
        "rewards": {"weights": {"accuracy": 1.0}},
        "rl": {
            "questions_per_rollout": work.questions,
            "group_size": work.group,
            "minibatches": work.minibatches,
            "kl_beta": work.kl_beta,
            "clip_low": work.clip,
            "clip_high": work.clip,
        },
        "optimizer": {"learning_rate": work.learning_rate, "weight_decay": 0.0},
        "checkpoint": {"every": steps},
    }
    for section, values in more.items():
        settings[section] = settings.get(section, {}) | values
    return settings


def run(
    work: Work, model: Path, questions: Path, folder: Path, steps: int, more: dict[str, dict]
) -> list[dict[str, Any]]:
    """A line of metrics for each step but the first, with "seconds" and "core_seconds" from the
    line before to it: all that a step costs, writing it down included. Raises RuntimeError with
    what the run said."""
    folder.mkdir(parents=True)
    path, out = folder / "recipe.yaml", folder / "run"
    path.write_text(yaml.safe_dump(recipe(work, model, questions, out, steps + 1, more)))
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_r1", "rl", str(path)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        marks = _watch(out / "metrics.jsonl", process)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"rl {path} ended with {process.returncode}:\n{output.read()}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            **line,
            "seconds": end.time - start.time,
            "core_seconds": end.used - start.used,
            "response_tokens": round(line["response_length/mean"] * work.answers),
        }
        for line, start, end in zip(lines[1:], marks[:-1], marks[1:], strict=True)
    ]


class Mark(NamedTuple):
    """time: of the clock; used: by all processes of the run until then, seconds of a core."""

    time: float
    used: float


def _watch(path: Path, process: subprocess.Popen) -> list[Mark]:
    """When each line of `path` was there, until the process ends."""
    marks: list[Mark] = []
    size = 0
    while process.poll() is None:
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            mark = Mark(time.perf_counter(), _used(psutil.Process(process.pid)))
            size = now
            marks += [mark] * (path.read_bytes().count(b"\n") - len(marks))
        time.sleep(POLL_SECONDS)
    return marks


def _used(process: psutil.Process) -> float:
    used = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            used += times.user + times.system
    return used
