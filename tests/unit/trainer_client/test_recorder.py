"""What a recorder shows of what it records."""

import pytest

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
