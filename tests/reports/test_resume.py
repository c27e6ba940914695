"""Schedules and what a resumed run continues with."""

import pytest

from megatron_r1.config import Config
from megatron_r1.trainer_client.schedule import learning_rate, warmup_note


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_b60_the_rate_depends_on_the_step_alone(decay):
    """So a run that continues after step 3 has the rates of one that was never interrupted."""
    settings = Config(
        optimizer={"warmup": 4, "decay": decay, "learning_rate": 1e-5, "min_learning_rate": 1e-6}
    ).optimizer
    whole = [learning_rate(settings, step, 8) for step in range(1, 9)]
    assert whole[:4] == pytest.approx([2.5e-6, 5e-6, 7.5e-6, 1e-5])
    at_half = {"constant": 1e-5, "linear": 5.5e-6, "cosine": 5.5e-6}[decay]
    assert whole[5] == pytest.approx(at_half)
    assert whole[7] == pytest.approx(1e-5 if decay == "constant" else 1e-6)
    assert [learning_rate(settings, step, 8) for step in (4, 5, 6)] == whole[3:6]


@pytest.mark.parametrize(
    ("warmup", "total", "reached"),
    [(100, 5, "5e-07 of 1e-05"), (5, 5, "1e-05 of 1e-05"), (100, 1, "1e-07"), (1, 1, "1e-05")],
)
def test_b62_a_warm_up_that_takes_the_whole_run_is_said(warmup, total, reached):
    settings = Config(optimizer={"warmup": warmup, "learning_rate": 1e-5}).optimizer
    note = warmup_note(settings, total)
    assert "optimizer.warmup" in note and reached in note and str(total) in note


@pytest.mark.parametrize(("warmup", "total"), [(4, 5), (0, 1), (0, 100)])
def test_b62_a_warm_up_that_ends_is_not(warmup, total):
    assert warmup_note(Config(optimizer={"warmup": warmup}).optimizer, total) == ""


@pytest.mark.parametrize(("algorithm", "updates"), [("grpo", 6), ("ppo", 4)])
def test_b62_the_steps_are_updates_of_the_policy(algorithm, updates):
    config = Config(
        run={"steps": 3},
        rl={"algorithm": algorithm, "minibatches": 2, "questions_per_rollout": 2},
        critic={"warmup_steps": 1},
    )
    assert config.num_policy_updates == updates
