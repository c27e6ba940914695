"""Whole runs of the algorithms that differ from GRPO in what they do, not in settings alone."""

import json
import math

import pytest
from command_line import run

ALWAYS = ("loss", "kl", "clip_fraction", "entropy", "grad_norm", "learning_rate")


def metrics_of(base, folder, algorithm, *options):
    settings = ["--run.folder", folder, "--run.steps", "2", "--rl.algorithm", algorithm]
    done = run("rl", base / "rl.yaml", *settings, *options)
    assert done.returncode == 0, done.stderr + done.stdout
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_ppo_warms_its_critic_up_and_then_trains_both(base, tmp_path):
    options = ["--critic.warmup_steps", "1", "--eval.every", "0"]
    first, second = metrics_of(base, tmp_path / "run", "ppo", *options)
    for line in (first, second):
        assert line["value/grad_norm"] > 0
        assert math.isfinite(line["value/explained_variance"])
    assert not [key for key in ALWAYS if key in first], "the policy waits"
    assert first["optimizer_step"] == 0 and second["optimizer_step"] == 2
    assert not [key for key in ALWAYS if not math.isfinite(second[key])]
    assert second["grad_norm"] > 0
    # The engine samples from the trainer's policy, also where that was pushed unchanged.
    assert max(line["logprob_diff/max"] for line in (first, second)) < 1e-4
    assert (tmp_path / "run/report.html").stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("reinforce_pp", []),
        ("rloo", []),
        ("reinforce", ["--rl.advantage_std", "batch"]),
        ("dapo", ["--rl.dynamic_sampling_rounds", "2"]),
        ("dr_grpo", []),
        ("gspo", []),
        ("cispo", ["--rl.dynamic_sampling", "false"]),
        ("own_algorithm:RULES", []),
    ],
)
def test_a_run(base, tmp_path, algorithm, options):
    lines = metrics_of(base, tmp_path / "run", algorithm, "--rl.minibatches", "2", *options)
    assert [line["optimizer_step"] for line in lines] == [2, 4]
    for line in lines:
        assert not [key for key in ALWAYS if not math.isfinite(line[key])]
        assert line["step_taken"] == 1.0
    if algorithm == "own_algorithm:RULES":
        assert [line["own"] for line in lines] == [1.0, 1.0]
    if algorithm in ("reinforce_pp", "rloo"):
        # The KL penalty, or what sets tokens apart from their mean, moves the policy in any case.
        assert lines[1]["grad_norm"] > 0


@pytest.mark.more
def test_every_correction_in_one_run(base, tmp_path):
    """A mask of each kind in turn, the first with bounds that only equal probabilities pass."""
    unbounded = {"rl.engine_mask_low": None, "rl.engine_mask_high": None}
    schedule = [
        {"from_step": 2, "rl.engine_mask": "sequence", **unbounded},
        {"from_step": 3, "rl.engine_mask": "divergence"},
    ]
    settings = {
        "run.steps": 3,
        "rl.engine_mask": "token",
        "rl.engine_mask_low": 1.0,
        "rl.engine_mask_high": 1.0,
        "rl.importance_cap": 5.0,
        "rl.truncated": "mask",
        "rl.reward_normalization": "each",
        "rl.kl_estimator": "unbiased",
        "rl.schedule": json.dumps(schedule),
        "rl.prompts_per_rollout": 16,  # tokens enough for a share of those that are masked
        # Rewards that differ, and answers most of which end before the limit.
        "rewards.weights": json.dumps({"accuracy": 1.0, "format": 0.1, "conciseness": 1.0}),
        "rollout.stop_token_ids": json.dumps([*range(3, 263, 2)]),
        "rollout.max_response_tokens": 8,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    token, sequence, divergence = metrics_of(base, tmp_path / "run", "grpo", *options)
    for line in (token, sequence, divergence):
        assert not [key for key in ALWAYS if not math.isfinite(line[key])]
        assert line["step_taken"] == 1.0 and line["logprob_diff/max"] < 1e-4
    # float32 on both sides differs in the last bits of most tokens.
    assert token["engine_mask/tokens"] > 0.2 and token["engine_mask/responses"] > 0.2
    assert sequence["engine_mask/tokens"] == sequence["engine_mask/responses"] == 0.0
    assert 0.0 <= divergence["engine_mask/tokens"] < 0.5
