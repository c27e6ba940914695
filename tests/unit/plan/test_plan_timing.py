"""Seconds of pushes and of pipeline bubbles."""

import pytest
from planned_jobs import ROOT, planned, real_job

from megatron_r1 import config as configuration
from megatron_r1.models import read_hf_config
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.job import PlannedJob


def test_a_push_within_a_node_goes_over_the_node_s_links():
    hf_config = read_hf_config(ROOT / "examples/laptop/model")
    h800, seconds = HARDWARE["H800"], {}
    for transport in ("shm", "cuda_ipc", "gloo", "nccl"):
        changed = {"push.transport": transport}
        config = configuration.load_recipe(ROOT / "examples/laptop/r1_zero.yaml", changed)
        estimate = JobEstimate(PlannedJob(hf_config, config, 1, h800))
        seconds[transport] = estimate.times.push_seconds()
        assert "one host" not in estimate.sections()["push"]["receive buffer"].formula
    each = 0.75 / estimate.engines.weight_bytes
    rates = [h800.host_link, h800.nvlink, h800.host_network, h800.network]
    assert [1 / s for s in seconds.values()] == pytest.approx([rate * each for rate in rates])
    over_hosts = ("cuda_ipc", "gloo", "nccl")
    many = [JobEstimate(planned(push__transport=name)).times.push_seconds() for name in over_hosts]
    assert many[0] == many[1] == pytest.approx(many[2] * h800.network / h800.host_network)


def test_virtual_stages_round_micro_batches_up_and_pay_for_it():
    # 278,528 tokens of a replica: 16 micro-batches fill a round of 16 stages, 17 begin another.
    sixteen, seventeen = real_job(), real_job(tokens_per_microbatch=16_384)
    assert (sixteen.num_microbatches, sixteen.schedule_slots) == (16, 16)
    assert (seventeen.num_microbatches, seventeen.schedule_slots) == (17, 32)
    assert JobEstimate(sixteen).times.idle_fraction(16, 16) == pytest.approx(15 / 47)
    assert JobEstimate(seventeen).step.number > JobEstimate(sixteen).step.number
    plain = JobEstimate(real_job(virtual_pipeline=1, pipeline_layout="Et*4|(t*4|)*14tmL"))
    assert plain.times.idle_fraction(16, plain.job.schedule_slots) == pytest.approx(15 / 31)
