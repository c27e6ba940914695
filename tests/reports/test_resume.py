"""Schedules and what a resumed run continues with."""

import json

import pytest

from megatron_r1.config import Config
from megatron_r1.config.optimizer import learning_rate, warmup_note
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.reporting.trackers import background_tracker, tracker_set
from megatron_r1.reporting.trackers.tracker import EVALUATION, STEP_METRIC, TrackedRun
from megatron_r1.reporting.trackers.tracker_set import TrackerSet


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_b60_the_rate_depends_on_the_step_alone(decay):
    """So a run that continues after step 3 has the rates of one that was never interrupted."""
    settings = Config(
        optimizer={
            "warmup_updates": 4,
            "decay": decay,
            "learning_rate": 1e-5,
            "min_learning_rate": 1e-6,
        }
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
    settings = Config(optimizer={"warmup_updates": warmup, "learning_rate": 1e-5}).optimizer
    note = warmup_note(settings, total)
    assert "optimizer.warmup_updates" in note and reached in note and str(total) in note


@pytest.mark.parametrize(("warmup", "total"), [(4, 5), (0, 1), (0, 100)])
def test_b62_a_warm_up_that_ends_is_not(warmup, total):
    assert warmup_note(Config(optimizer={"warmup_updates": warmup}).optimizer, total) == ""


@pytest.mark.parametrize(("algorithm", "updates"), [("grpo", 6), ("ppo", 4)])
def test_b62_the_steps_are_updates_of_the_policy(algorithm, updates):
    config = Config(
        run={"steps": 3},
        rl={"algorithm": algorithm, "minibatches": 2, "prompts_per_rollout": 2},
        critic={"warmup_steps": 1},
    )
    assert config.num_policy_updates == updates


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("killed", [1, 2, 5, 7])
def test_b61_examples_go_on_where_they_were(killed, shuffled):
    """10 rows in batches of 2, over more than one epoch."""
    whole = EpochSampler(list("abcdefghij"), seed=3, shuffled=shuffled)
    batches = [whole.next(2) for _ in range(9)]
    first = EpochSampler(list("abcdefghij"), seed=3, shuffled=shuffled)
    assert [first.next(2) for _ in range(killed)] == batches[:killed]
    state = json.loads(json.dumps(first.state_dict()))  # as in a checkpoint
    resumed = EpochSampler(list("abcdefghij"), seed=3, shuffled=shuffled)
    resumed.load_state_dict(state)
    assert [resumed.next(2) for _ in range(9 - killed)] == batches[killed:]


class Kept:
    """A tracker that holds its lines, as a server does between two starts of a run."""

    lines: dict = {}

    def __init__(self, run):
        self._own = Kept.lines.setdefault(run.folder, [])
        self.notes = []
        steps = [numbers for _, numbers in self._own]
        self.tracked_steps = {
            key: max((n[key] for n in steps if key in n), default=-1)
            for key in (STEP_METRIC, EVALUATION)
        }

    def send(self, step, numbers):
        self._own.append((step, numbers))

    def finish(self, finished):
        pass


@pytest.mark.parametrize("killed", [1, 2, 3, 4])
def test_b65_each_step_and_evaluation_is_tracked_once_at_its_own_step(
    killed, tmp_path, monkeypatch
):
    """Evaluations every 2 steps; the run is killed, and goes on with what its files have."""
    monkeypatch.setitem(tracker_set.OPENERS, "wandb", Kept)
    monkeypatch.setattr(background_tracker, "CLOSE_SECONDS", None)
    run = TrackedRun(tmp_path, "p", {})
    steps = [{"step": step, "reward/mean": step / 10} for step in range(1, 7)]
    evaluations = [{"step": step, "eval/accuracy": step / 8} for step in (0, 2, 4, 6)]
    first = TrackerSet(["wandb"], run, lambda note: None)
    first.send_history([], [])
    first.send_evaluation(evaluations[0])
    for line in steps[:killed]:
        first.send_step(line)
        if line["step"] % 2 == 0:
            first.send_evaluation(evaluations[line["step"] // 2])
    first.close(False)
    saved = killed - killed % 2  # checkpoints every 2 steps
    second = TrackerSet(["wandb"], run, lambda note: None)
    second.send_history(steps[:saved], [e for e in evaluations if e["step"] <= saved])
    for line in steps[saved:]:
        second.send_step(line)
        if line["step"] % 2 == 0:
            second.send_evaluation(evaluations[line["step"] // 2])
    second.close(True)
    tracked = Kept.lines[tmp_path]
    assert [n[STEP_METRIC] for _, n in tracked if STEP_METRIC in n] == [1, 2, 3, 4, 5, 6]
    found = {n[EVALUATION]: n["eval/accuracy"] for _, n in tracked if EVALUATION in n}
    assert found == {e["step"]: e["eval/accuracy"] for e in evaluations}
    assert len([n for _, n in tracked if EVALUATION in n]) == 4
