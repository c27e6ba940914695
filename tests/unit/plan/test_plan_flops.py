"""Floating-point operations of training, against published figures."""

import pytest
from planned_jobs import LLAMA_405B, V3

from megatron_r1.plan.counts import forward_flops


@pytest.mark.parametrize(
    "hf, gflop", [(V3, 250), (LLAMA_405B, 2448)], ids=["DeepSeek-V3", "Llama-3.1-405B"]
)
def test_training_flops_per_token_are_the_published_ones(hf, gflop):
    # arXiv 2505.09343, table 2: training, 4,096 tokens.
    assert 3 * forward_flops(hf, 4096) / 1e9 == pytest.approx(gflop, rel=0.015)
