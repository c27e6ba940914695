"""A whole run whose engines have two ranks each and sleep while the trainer computes."""

import json

import pytest
from command_line import run


@pytest.mark.more
def test_engines_that_sleep_and_share_their_model_agree_with_the_trainer(base):
    settings = {
        "run.folder": base / "colocated",
        "run.steps": 2,
        "rollout.colocated": "true",
        "rollout.tensor": 2,
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
