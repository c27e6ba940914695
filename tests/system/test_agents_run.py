"""A model learns to use a tool: examples/agents with real engines and trainer, shortened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import command, environment, run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def lines(path: Path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows, and a base model that knows the form of a call."""
    folder = tmp_path_factory.mktemp("agents")
    subprocess.run(
        [sys.executable, "-m", "examples.agents.make_lookup", folder], check=True, cwd=ROOT
    )
    data = ("--sft.data", folder / "demonstrations.jsonl", "--model.path", folder / "model")
    where = ("--run.folder", folder / "base", "--run.steps", 150)
    done = run("sft", ROOT / "examples/agents/base.yaml", *data, *where)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def arguments(folder: Path, name: str, steps: int, *more: object) -> list:
    recipe = ROOT / "examples/agents/lookup.yaml"
    where = ("--run.folder", folder / name, "--run.steps", steps, "--run.log_samples", 16)
    data = ("--model.path", folder / "base/hf", "--data.path", folder / "rows.jsonl")
    return ["rl", recipe, *where, *data, "--data.num_heldout", 16, *more]


def check_steps(metrics: list[dict], steps: int, limit: float) -> None:
    """limit: of the difference of log-probabilities."""
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    for line in metrics:
        # What was sampled over several turns is what the trainer computes: the tokens are the same.
        assert line["logprob_diff/max"] < limit
        assert line["episode/turns"] > 1
        assert sum(v for k, v in line.items() if k.startswith("episode/status/")) == pytest.approx(
            1
        )


def test_episodes_are_trained_on_the_tokens_that_were_sampled(folder):
    done = run(*arguments(folder, "run", 3, "--rl.minibatches", 2))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "chat template, a result after a call: exact" in done.stdout
    check_steps(lines(folder / "run/metrics.jsonl"), 3, 1e-4)
    samples = lines(folder / "run/samples.jsonl")
    with_calls = [s for s in samples if len(s["turns"]) > 2]
    assert with_calls
    for sample in samples:
        assert sample["status"] in ("done", "max_turns", "max_tokens")
        assert [turn["role"] for turn in sample["turns"]][:2] == ["user", "assistant"]
        assert all(turn["trained"] == (turn["role"] == "assistant") for turn in sample["turns"])
        trained = sum(turn["tokens"] for turn in sample["turns"] if turn["trained"])
        assert trained == sample["length"]


def test_a_killed_run_goes_on_with_the_episodes_that_were_finished(folder):
    ahead = ("--rl.staleness", 1, "--rl.importance_cap", 2.0, "--checkpoint.every", 1)
    started = command(*arguments(folder, "killed", 5, *ahead))
    process = subprocess.Popen(started, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 240
    while len(lines(folder / "killed/metrics.jsonl")) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run(*arguments(folder, "killed", 5, *ahead))
    assert done.returncode == 0, done.stderr + done.stdout
    metrics = lines(folder / "killed/metrics.jsonl")
    check_steps(metrics, 5, 5.0)  # of policies one step apart
    assert sum(line["groups/replayed"] for line in metrics) > 0
