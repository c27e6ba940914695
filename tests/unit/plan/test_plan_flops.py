"""Floating-point operations of training, against published figures."""

import pytest
from planned_jobs import LLAMA_405B, V3, planned, real_job

from megatron_r1.plan.counts import ModelCounts
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.flops import forward_flops, layer_flops
from megatron_r1.plan.rollout import RolloutTime
from megatron_r1.plan.step_time import StepTime


@pytest.mark.parametrize(
    "hf_config, gflop", [(V3, 250), (LLAMA_405B, 2448)], ids=["DeepSeek-V3", "Llama-3.1-405B"]
)
def test_training_flops_per_token_are_the_published_ones(hf_config, gflop):
    # arXiv 2505.09343, table 2: training, 4,096 tokens.
    assert 3 * forward_flops(hf_config, 4096) / 1e9 == pytest.approx(gflop, rel=0.015)


def test_products_with_weights_are_as_much_faster_in_fp8_and_attention_is_not():
    """By hand: of a layer 2 x (attention's and experts' weights) FLOP, and the scores."""
    per_layer = 2 * (187_107_328 + (8 + 1) * 3 * 7168 * 2048)
    router, scores = 2 * 256 * 7168, 128 * (192 + 128) * 8704
    job = real_job()
    assert layer_flops(job, 60, 8704) == pytest.approx(per_layer + router + scores, rel=1e-3)
    fast = layer_flops(job, 60, 8704, 2.0)
    assert fast == pytest.approx(per_layer / 2 + router + scores, rel=1e-3)
    halved = forward_flops(V3, 8704) - forward_flops(V3, 8704, 2.0)
    assert halved == pytest.approx(ModelCounts(V3).num_multiplied)


def test_training_and_engines_in_fp8_compute_at_fp8_s_rate():
    plain, fp8 = planned(), planned(fp8__recipe="blockwise")
    seconds = [StepTime(job, EngineMemory(job)).compute_seconds(3, True) for job in (plain, fp8)]
    assert 1.3 < seconds[0] / seconds[1] < 1.46
    pushed = planned(push__fp8=True)
    slow, fast = (RolloutTime(EngineMemory(job)).prefill_seconds for job in (plain, pushed))
    assert slow / fast > 1.4
