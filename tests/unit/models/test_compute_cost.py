"""The compute of a sample is that of its parameters and of its attention."""

import json
from pathlib import Path

import pytest

from megatron_r1.models import read_hf_config
from megatron_r1.models.compute_cost import active_parameters, balance_length, sample_cost

DEEPSEEK_V3 = read_hf_config("examples/deepseek_r1/model")


def test_a_long_sample_costs_what_its_attention_does():
    # DeepSeek-V3 activates 37 billion parameters per token, counting the embedding's 0.9.
    assert active_parameters(DEEPSEEK_V3) == pytest.approx(37e9, rel=0.02)
    balance = balance_length(DEEPSEEK_V3)
    # Two products of s x 192 and s x 128 per head, half of them masked, against 2 per parameter.
    attention = 61 * 128 * (2 * balance * 192 + 2 * balance * 128) / 2
    assert attention == pytest.approx(2 * active_parameters(DEEPSEEK_V3))
    assert sample_cost(DEEPSEEK_V3)(round(balance)) == pytest.approx(2 * balance, rel=1e-4)


def test_the_laptops_model_has_a_cost():
    hf_config = json.loads(Path("examples/laptop/model/config.json").read_text())
    assert balance_length(hf_config) > 0
