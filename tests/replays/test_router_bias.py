"""The bias by which a router without an auxiliary loss balances its experts.

It decides which experts a token gets, no gradient passes through it, and it is the one tensor that
is fp32 in a bf16 model, so that paths for weights miss it or change it: NovaSky-AI/SkyRL#1505 (left
out of an export in buckets), NVIDIA-NeMo/RL#3540 (rounded to bfloat16 on its way: the trainer's and
the engine's policy are 0.002 apart until step 18, then more and more), SkyRL#1816 (its other dtype
shifts what follows it in a bucket). Nothing fails: most tokens get the same experts all the same.

Here the trainer updates the bias, and the engine keeps the first one, or rounds each.
"""

import pytest

pytestmark = pytest.mark.more

MOVING = ["--model.expert_bias_update_rate", "1.0e-3"]


@pytest.mark.parametrize(
    "fault", ["kept_bias", pytest.param("rounded_bias", marks=pytest.mark.more)]
)
def test_a_bias_that_is_not_the_trainers_ends_the_run_by_its_name(replay, fault):
    ended = replay.run(fault, "are not what the engine computes with", *MOVING)
    assert ended.returncode == 1 and ended.seconds is not None, ended.printed
    assert "2 tensors arrived" in ended.printed
    for layer in (1, 2):
        assert f"model.layers.{layer}.mlp.gate.e_score_correction_bias" in ended.printed
    assert (ended.metrics, ended.checkpoints) == ([], [])
