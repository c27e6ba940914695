"""A model learns to use a tool: examples/agents with real engines and trainer, shortened."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import command, environment, run
from lookup_base import ROOT, lines

from megatron_r1.why.all_checks import examine_step
from megatron_r1.why.comparison import EQUAL
from megatron_r1.why.record.examinable_steps import open_run
from megatron_r1.why.record.step_reader import read_step


def arguments(base: Path, folder: Path, name: str, steps: int, *more: object) -> list:
    recipe = ROOT / "examples/agents/lookup.yaml"
    where = ("--run.folder", folder / name, "--run.steps", steps, "--run.log_samples", 16)
    more = (*more, "--agents.call_seconds", 3600)  # on a slow machine, too
    data = ("--model.path", base / "base/hf", "--data.path", base / "rows.jsonl")
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


@pytest.mark.more
def test_episodes_are_trained_on_the_tokens_that_were_sampled(lookup_base, tmp_path):
    done = run(*arguments(lookup_base, tmp_path, "run", 3, "--rl.minibatches", 2))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "chat template, a result after a call: exact" in done.stdout
    check_steps(lines(tmp_path / "run/metrics.jsonl"), 3, 1e-4)
    samples = lines(tmp_path / "run/samples.jsonl")
    with_calls = [s for s in samples if len(s["turns"]) > 2]
    assert with_calls
    for sample in samples:
        assert sample["status"] in ("done", "max_turns", "max_tokens")
        assert [turn["role"] for turn in sample["turns"]][:2] == ["user", "assistant"]
        assert all(turn["trained"] == (turn["role"] == "assistant") for turn in sample["turns"])
        trained = sum(turn["tokens"] for turn in sample["turns"] if turn["trained"])
        assert trained == sample["length"]


@pytest.mark.more
def test_episodes_from_a_part_of_the_vocabulary_are_of_one_policy(lookup_base, tmp_path):
    """Where a token has the probability 0.999 the cut keeps it alone: without the kept ids the
    policies would differ by 1e-3 there, and by more elsewhere."""
    cut = ("--rollout.top_p", 0.8, "--rollout.top_k", 24)
    keep = ("--rl.keep_sample_log", "true", "--checkpoint.every", 1, "--checkpoint.keep_every", 1)
    done = run(*arguments(lookup_base, tmp_path, "cut", 2, *cut, *keep))
    assert done.returncode == 0, done.stderr + done.stdout
    check_steps(lines(tmp_path / "cut/metrics.jsonl"), 2, 1e-4)
    step = read_step(*open_run(tmp_path / "cut"), 2)
    for sequence in step.sequences:
        assert sequence.kept_ids is not None and sequence.kept_ids.counts.min() >= 1
    # By transformers.
    found = {each.name: each for each in examine_step(step).comparisons}
    for name in ("tokens that the engines kept", "engines' log-probabilities"):
        assert found[name].status == EQUAL, str(found[name])


@pytest.mark.more
def test_a_killed_run_goes_on_with_the_episodes_that_were_finished(lookup_base, tmp_path):
    ahead = ("--rl.staleness", 1, "--rl.importance_cap", 2.0, "--checkpoint.every", 1)
    started = command(*arguments(lookup_base, tmp_path, "killed", 5, *ahead))
    process = subprocess.Popen(started, env=environment(), start_new_session=True)
    third = tmp_path / "killed/sample_log/step_00000003.log"
    while not (third.exists() and third.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run(*arguments(lookup_base, tmp_path, "killed", 5, *ahead))
    assert done.returncode == 0, done.stderr + done.stdout
    metrics = lines(tmp_path / "killed/metrics.jsonl")
    check_steps(metrics, 5, 5.0)  # of policies one step apart
    assert sum(line["groups/restored"] for line in metrics) > 0
