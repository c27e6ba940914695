"""What ranks send, by hand."""

import pytest
from planned_jobs import ROOT, real_job

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.plan.communication import traffic_by_axis
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob


def test_what_a_rank_sends_by_hand():
    sent = traffic_by_axis(real_job(), 3)
    # 512 samples of 8,704 tokens over 16 replicas in 16 micro-batches, over context 2 and tensor 4.
    split = 32 * 8704 / 16 / 8
    assert sent["pipeline"].microbatch_bytes == pytest.approx(split * 7168 * 2 * 2 * 2)
    assert sent["expert"].forward_bytes == pytest.approx(4 * 2 * 8 * 1.2 * split * 7168 * 2 * 7 / 8)
    assert sent["data"].size == 32 and sent["data"].microbatch_bytes == 0


def test_a_rank_sends_a_whole_head_where_there_are_fewer_than_tensor_ranks():
    recipe = ROOT / "examples/distill/qwen2.5-math-1.5b.yaml"
    config = configuration.load_recipe(recipe, {"parallel.tensor": 4, "parallel.context": 2})
    hf_config = read_hf_config(config.model.path)
    assert (
        hf_config["num_key_value_heads"],
        hf_config["hidden_size"] // hf_config["num_attention_heads"],
    ) == (2, 128)
    job = PlannedJob(hf_config, config, 8, HARDWARE["H800"], verb="sft")
    layers = 28
    expected = (
        layers * 2 * 128 * job.mean_microbatch_tokens * 2
    )  # a key and a value head, 2 B a value
    assert traffic_by_axis(job, 0)["context"].forward_bytes == pytest.approx(expected)


def test_tensor_ranks_send_what_the_others_lack():
    recipe = ROOT / "examples/distill/qwen2.5-math-1.5b.yaml"
    config = configuration.load_recipe(recipe, {"parallel.tensor": 4})
    job = PlannedJob(read_hf_config(config.model.path), config, 4, HARDWARE["H800"], verb="sft")
    # In each of 28 layers attention and MLP gather and scatter 1,536 values a token, three quarters
    # of which go to other ranks.
    expected = 28 * 2 * 2 * 1536 * job.mean_microbatch_tokens * 2 * 3 / 4
    assert traffic_by_axis(job, 0)["tensor"].forward_bytes == pytest.approx(expected)
