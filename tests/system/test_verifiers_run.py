"""Whole runs on an environment of verifiers with a tool, and its server killed in mid-episode.
Needs `make agents`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import AGENTS_PYTHON, command, command_of, environment, members
from lookup_base import lines

HERE = Path(__file__).parent
STEPS = 3
RECIPE = """
run: {{folder: {folder}/run, steps: {steps}, log_samples: 64}}
model: {{path: {base}/base/hf, dtype: float32}}
data: {{template: chat, num_heldout: 16}}
agents:
  max_turns: 4
  verifiers:
    python: {python}
    taskset: verifiers_lookup
    harness: verifiers_lookup
    harness_options: {{seconds: {seconds}, journal: {folder}/journal}}
rollout: {{max_response_tokens: 64, max_model_len: 256, dtype: float32, max_num_seqs: 64}}
rewards: {{weights: {{accuracy: 1.0}}}}
rl: {{prompts_per_rollout: 8, group_size: 8, minibatches: 1, reference_refresh: 20}}
optimizer: {{learning_rate: 2.0e-4, warmup_updates: 5, weight_decay: 0.0}}
eval: {{samples: 1, temperature: 1.0}}
checkpoint: {{every: 1}}
"""
pytestmark = pytest.mark.skipif(not AGENTS_PYTHON.exists(), reason="make agents")


def start(base: Path, folder: Path, seconds: float) -> subprocess.Popen:
    """Start the run, or continue it; seconds: that a call of the tool takes."""
    recipe = folder / "recipe.yaml"
    options = {"base": base, "folder": folder, "python": AGENTS_PYTHON}
    recipe.write_text(RECIPE.format(steps=STEPS, seconds=seconds, **options))
    return subprocess.Popen(
        command("rl", recipe),
        env=environment(),
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate()[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def check(folder: Path) -> list[dict]:
    metrics = lines(folder / "run/metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert line["logprob_diff/max"] < 1e-4, "trained is what was sampled"
        assert line["episode/turns"] > 1
        rewarded = ("done", "max_turns", "max_tokens")
        assert sum(line.get(f"episode/status/{name}", 0) for name in rewarded) == pytest.approx(1)
    return metrics


@pytest.mark.more
def test_an_environment_trains(lookup_base, tmp_path):
    process = start(lookup_base, tmp_path, 0.0)
    output = finish(process)
    assert process.returncode == 0, output
    metrics = check(tmp_path)
    assert any(0 < line["reward/mean"] < 1 for line in metrics)
    samples = lines(tmp_path / "run/samples.jsonl")
    whole = [s for s in samples if [t["role"] for t in s["turns"]].count("tool") == 2]
    assert whole, "some follow the table to its end"
    for sample in samples:
        trained = sum(turn["tokens"] for turn in sample["turns"] if turn["trained"])
        assert trained == sample["length"]


@pytest.mark.slow
def test_a_server_that_is_killed_gives_no_reward_and_the_same_command_continues(
    lookup_base, tmp_path
):
    journal = tmp_path / "journal"
    process = start(lookup_base, tmp_path, 2.0)
    while not lines(tmp_path / "run/metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.1)
    before = journal.stat().st_size
    while journal.stat().st_size == before:  # calls of the second step, which take two seconds
        assert process.poll() is None
        time.sleep(0.02)
    [server] = [pid for pid in members(process.pid) if "verifiers/serve.py" in command_of(pid)]
    os.killpg(server, signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 1, output
    assert "environment_error" in output and "verifiers' server has ended" in output
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 1
    again = start(lookup_base, tmp_path, 2.0)
    output = finish(again)
    assert again.returncode == 0, output
    check(tmp_path)
