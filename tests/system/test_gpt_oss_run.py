"""gpt-oss through sft and rl from the command line."""

import json
import shutil

import pytest
from command_line import run
from tiny_models import GPT_OSS


@pytest.mark.slow
def test_gpt_oss_is_trained_by_rl_with_engines_of_two_ranks(base):
    model, start, folder = (base / f"gpt_oss_{name}" for name in ("model", "sft", "rl"))
    shutil.copytree(base / "model", model)
    tokens = json.loads((model / "config.json").read_text())
    ids = {key: tokens[key] for key in tokens if key.endswith("_token_id") or key == "vocab_size"}
    (model / "config.json").write_text(json.dumps(GPT_OSS | ids))
    done = run("sft", base / "sft.yaml", "--model.path", model, "--run.folder", start)
    assert done.returncode == 0, done.stdout + done.stderr
    layout = [
        "--parallel.processes",
        "2",
        "--parallel.expert",
        "2",
        "--rollout.tensor_parallel",
        "2",
    ]
    recipe = [base / "rl.yaml", "--model.path", start / "hf", "--run.folder", folder]
    done = run("rl", *recipe, "--run.steps", "2", *layout)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    # The second step's responses are those of pushed weights.
    assert max(line["logprob_diff/max"] for line in metrics) < 1e-4
    assert metrics[-1]["kl"] > 1e-5
