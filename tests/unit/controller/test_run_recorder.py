"""What a recorder shows and writes of what it is given."""

import json

import pytest
from refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.controller.run_recorder import RunRecorder, RunState
from megatron_r1.reporting.run_folder import RunFolder


@pytest.mark.parametrize("weights", [{"accuracy": 1.0}, {"accuracy": 1.0, "format": 0.1}])
def test_the_format_reward_is_shown_where_it_has_a_weight_and_recorded_always(
    tmp_path, capsys, weights
):
    config = Config(run={"trackers": []}, rewards={"weights": weights})
    with RunFolder(tmp_path) as folder:
        recorder = RunRecorder(folder, config, may_change=(), title="t")
        line = {"step": 0, "eval/format": 0.25, "eval/pass@1": 0.5, "eval/questions": 47}
        recorder.record_evaluation(line, [])
        line = {"step": 1, "accuracy": 0.5, "format/mean": 0.25, "time/step": 1.0}
        recorder.record_step(line, [])
        recorder.close()
        said = capsys.readouterr().out
        assert "held-out at step 0" in said and "pass@1 50.0%, questions 47\n" in said
        assert ("format" in said) == ("format" in weights)
        assert folder.read_evaluations()[0]["eval/format"] == 0.25
        assert folder.read_metrics()[0]["format/mean"] == 0.25


def test_metrics_and_evaluations_go_to_tensorboard_by_default(tmp_path):
    with RunFolder(tmp_path) as folder:
        recorder = RunRecorder(folder, Config(), may_change=(), title="t")
        recorder.record_step({"step": 1, "accuracy": 0.5}, [])
        recorder.record_evaluation({"step": 1, "eval/accuracy": 0.25}, [])
        recorder.close()
        events = EventAccumulator(str(folder.tensorboard))
        events.Reload()
        written = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in ("accuracy", "eval/accuracy")
        }
        assert written == {"accuracy": [(1, 0.5)], "eval/accuracy": [(1, 0.25)]}


def test_without_the_tracker_nothing_is_written_for_tensorboard(tmp_path):
    with RunFolder(tmp_path) as folder:
        recorder = RunRecorder(folder, Config(run={"trackers": []}), may_change=(), title="t")
        recorder.record_step({"step": 1, "accuracy": 0.5}, [])
        recorder.close()
        assert not folder.tensorboard.exists()


def test_the_state_comes_back_from_a_checkpoint_where_its_sampler_has_the_old_key():
    state = RunState(3, 6, {"position": 12}, {"math": 5})
    saved = state.for_checkpoint()
    assert list(saved) == ["step", "optimizer_step", "sampler", "rewards"]
    assert saved["sampler"] == {"position": 12} and RunState.from_checkpoint(saved) == state


def settings_of(steps):
    return Config(run={"steps": steps, "trackers": []}, checkpoint={"verify": "none"})


def run_of(tmp_path, recorded, checkpoint, steps):
    """A run folder as a kill leaves it, with `run.steps` in its config."""
    with RunFolder(tmp_path) as folder:
        folder.write_config(settings_of(steps).model_dump())
        for step in range(1, recorded + 1):
            folder.append_metrics({"step": step})
    if checkpoint:
        made = tmp_path / f"checkpoints/step_{checkpoint:08d}"
        made.mkdir(parents=True)
        (made / "run_state.json").write_text(json.dumps({"step": checkpoint}))


@pytest.mark.parametrize(
    ("recorded", "checkpoint", "steps", "said"),
    [
        (7, 5, 20, ("continuing after step 5", "1 to 5", "6 to 7 done again", "8 to 20")),
        (3, 0, 20, ("1 to 3 done again", "checkpoint.every", "4 to 20")),
        (5, 5, 30, ("continuing after step 5", "was 20 and is 30", "6 to 30")),
        (7, 5, 7, ("6 to 7 done again", "was 20 and is 7")),
        (10, 10, 6, ("1 to 10", "was 20 and is 6", "no step is left")),
        (0, 0, 20, ()),
    ],
)
def test_one_line_says_what_is_kept_and_what_is_done_again(
    tmp_path, capsys, recorded, checkpoint, steps, said
):
    run_of(tmp_path, recorded, checkpoint, steps=20)
    config = settings_of(steps)
    with RunFolder(tmp_path) as folder:
        RunRecorder(folder, config, may_change=("run.steps",), title="t").close()
        lines = [
            li for li in capsys.readouterr().out.splitlines() if "continu" in li or "over" in li
        ]
        assert len(lines) == bool(said) and all(part in "".join(lines) for part in said)
        assert [line["step"] for line in folder.read_metrics()] == [*range(1, checkpoint + 1)]


@pytest.mark.parametrize(("recorded", "checkpoint", "steps"), [(7, 5, 6), (7, 5, 3), (4, 0, 2)])
def test_fewer_steps_than_are_finished_are_refused_and_nothing_is_lost(
    tmp_path, recorded, checkpoint, steps
):
    run_of(tmp_path, recorded, checkpoint, steps=20)
    config = settings_of(steps)
    with RunFolder(tmp_path) as folder:
        with refused("run.steps", Cause.CONFLICT, steps, recorded):
            RunRecorder(folder, config, may_change=("run.steps",), title="t")
        assert len(folder.read_metrics()) == recorded
        assert folder.read_config()["run"]["steps"] == 20
