"""What a user gets wrong: one clear message, quickly, and an exit status that is not 0."""

import json

import pytest
from command_line import run


def test_a_wrong_setting_is_one_message(base):
    """The others are refused in tests/unit/commands/test_refused_runs.py."""
    done = run("rl", base / "rl.yaml", "--rl.group_sise", "4")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "rl.group_sise" in done.stderr and done.stdout == ""


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(base, tmp_path):
    sft = base / "sft.yaml"
    first = run("sft", sft, "--run.folder", tmp_path / "run", "--run.steps", "1")
    assert first.returncode == 0, first.stderr
    other = run("sft", sft, "--run.folder", tmp_path / "run", "--model.init_std", "0.2")
    assert other.returncode == 2 and "model.init_std" in other.stderr
    # The same settings, but the folder they name holds another model now.
    config = base / "model/config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(before), "moe_intermediate_size": 48}))
        done = run("sft", sft, "--run.folder", tmp_path / "run", "--run.steps", "2")
    finally:
        config.write_text(before)
    assert done.returncode != 0 and "does not fit this model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.more
def test_an_engine_that_cannot_start_is_one_message(base, tmp_path):
    settings = ["--run.folder", tmp_path / "run", "--rollout.start_timeout_seconds", "0.01"]
    done = run("rl", base / "rl.yaml", *settings)
    assert done.returncode == 1
    assert "engine-0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.more
def test_a_run_that_diverges_stops_before_it_saves_what_is_lost(base, tmp_path):
    settings = ["--run.folder", tmp_path / "run", "--optimizer.learning_rate", "1.0e+30"]
    done = run("sft", base / "sft.yaml", *settings)
    assert done.returncode == 1 and "optimizer.learning_rate" in done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{len(lines):08d}"
