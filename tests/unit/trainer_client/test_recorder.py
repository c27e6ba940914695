"""What a recorder shows and writes of what it is given."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_r1.config import Config
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer_client.recorder import Recorder


@pytest.mark.parametrize("weights", [{"accuracy": 1.0}, {"accuracy": 1.0, "format": 0.1}])
def test_the_format_reward_is_shown_where_it_has_a_weight_and_recorded_always(
    tmp_path, capsys, weights
):
    config = Config(run={"trackers": []}, rewards={"weights": weights})
    with RunFolder(tmp_path) as folder:
        recorder = Recorder(folder, config, may_change=(), title="t")
        recorder.evaluation({"step": 0, "eval/format": 0.25, "eval/pass@1": 0.5}, [])
        recorder.step({"step": 1, "accuracy": 0.5, "format/mean": 0.25, "time/step": 1.0}, [])
        recorder.close()
        said = capsys.readouterr().out
        assert "held-out at step 0" in said and "pass@1 50.0%" in said
        assert ("format" in said) == ("format" in weights)
        assert folder.read_evaluations()[0]["eval/format"] == 0.25
        assert folder.read_metrics()[0]["format/mean"] == 0.25


def test_metrics_and_evaluations_go_to_tensorboard_by_default(tmp_path):
    with RunFolder(tmp_path) as folder:
        recorder = Recorder(folder, Config(), may_change=(), title="t")
        recorder.step({"step": 1, "accuracy": 0.5}, [])
        recorder.evaluation({"step": 1, "eval/accuracy": 0.25}, [])
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
        recorder = Recorder(folder, Config(run={"trackers": []}), may_change=(), title="t")
        recorder.step({"step": 1, "accuracy": 0.5}, [])
        recorder.close()
        assert not folder.tensorboard.exists()
