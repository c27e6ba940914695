"""A NaN that spreads.

facebookresearch/habitat-lab#2226: one worker's gradient has a NaN; the sum over workers has it, the
clipped gradient has it, then every weight, the metrics and at last the checkpoint, while the run
goes on. verl-project/verl#721 and #747: a log-probability under the old policy turns NaN, in the
next step every loss is, the rewards fall to 0, and all answers are exclamation marks, for as long
as the run is left alone. kyutai-labs/pocket-tts#262: by then the checkpoints that are kept are all
of NaN.

Here it is one gradient of one of two ranks, or one token's log-probability, in the second step.
"""

import math

import pytest

FAULTS = {
    "nan_gradient": (["--parallel.processes", 2], "grad_norm is nan"),
    "nan_logprob": (["--rl.minibatches", 2], "loss is nan"),
}


@pytest.mark.more  # two starts each
@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_ends_before_anything_is_saved_and_goes_on_from_the_step_before(replay, fault):
    settings, named = FAULTS[fault]
    sentence = f"{named}: the run stops before it is saved in a checkpoint"
    ended = replay.run(fault, sentence, *settings)
    assert ended.returncode == 1 and ended.seconds is not None, ended.printed
    assert [line["step"] for line in ended.metrics] == [1]
    assert ended.checkpoints == ["step_00000001"]
    assert not (ended.folder / "hf").exists()

    again = replay.run(None, "finished", *settings)
    assert again.returncode == 0, again.printed
    assert [line["step"] for line in again.metrics] == [1, 2, 3, 4]
    for line in again.metrics:
        assert "nonfinite" not in line and math.isfinite(line["logprob_diff/max"])
