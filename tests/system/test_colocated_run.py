"""A whole run whose engines have two ranks each and sleep while the trainer computes."""

import json

import pytest
from command_line import run


@pytest.mark.slow  # the next one's engines sleep too
def test_engines_that_sleep_and_share_their_model_agree_with_the_trainer(base):
    settings = {
        "run.folder": base / "colocated",
        "run.steps": 2,
        "rollout.colocated": "true",
        "rollout.tensor_parallel": 2,
        "rollout.expert_parallel": "true",
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    done = run("rl", base / "rl.yaml", *options)
    assert done.returncode == 0, done.stderr
    lines = (base / "colocated" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 2]
    assert [line["engines/up"] for line in metrics] == [1, 1]
    # Both in float32; weights of another version would differ by more than 0.1.
    assert all(line["logprob_diff/mean"] < 1e-3 for line in metrics)


@pytest.mark.more
def test_a_trainer_whose_state_is_offloaded_while_engines_sample_trains_evaluates_and_resumes(base):
    """Each step is saved, for which the engines give the memory back and get their weights again;
    the second command begins at a checkpoint. A call of the trainer in between ends the run."""
    folder, disk = base / "offloaded", base / "disk"
    disk.mkdir()
    settings = {
        "run.folder": folder,
        "rollout.colocated": "true",
        "checkpoint.every": 1,
        "eval.every": 1,
        "parallel.processes": 2,
    }
    for steps, place in ((2, ["host"]), (3, ["disk", "--parallel.offload_folder", disk])):
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        words += ["--run.steps", steps, "--parallel.offload_between_phases", *place]
        done = run("rl", base / "rl.yaml", *words)
        assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        # Both in float32; weights of another version would differ by more than 0.1.
        assert 0 < line["push/probe_diff"] < 1e-3 and line["logprob_diff/mean"] < 1e-3
    evaluations = (folder / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 1, 2, 3]
    assert not list(disk.iterdir()), "the trainer left its state on the disk"
