"""Seconds between the phases of a step, and of the pipeline's hops, by hand."""

import pytest
from planned_jobs import planned, real_job

from megatron_r1.config.hardware import GIB
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.phase_overheads import checkpoint_time, sleep_wake_time, weight_load_time
from megatron_r1.plan.step_time import StepTime
from megatron_r1.plan.timing import time_section


def test_weights_are_read_and_written_and_each_tensor_costs_the_host():
    """19.85 GiB twice at 38% of 3.35 TB/s; of 1,223 tensors each 0.1 ms."""
    found = weight_load_time(planned())
    assert "1,223 tensors" in found.formula
    assert found.number == pytest.approx(2 * 19.85 * GIB / (0.38 * 3.35e12) + 0.1223, rel=1e-3)
    # From the host, at 78% of 55 GB/s.
    over_gloo = weight_load_time(planned(push__transport="gloo"))
    assert over_gloo.number == pytest.approx(19.85 * GIB / (0.78 * 55e9) + 0.1223, rel=1e-3)


def test_engines_sleep_and_wake_once_a_step_where_they_share_the_gpus():
    assert sleep_wake_time(planned()).number == pytest.approx(1.0 + 2.6)
    assert time_section(JobEstimate(planned()).times)["sleep and wake"].number == pytest.approx(3.6)
    alone = planned(rollout_gpus=2048, rollout__colocated=False, rl__importance_cap=2.0)
    assert "sleep and wake" not in time_section(JobEstimate(alone).times)


def test_a_save_stops_the_trainer_for_its_copy_and_without_threads_for_its_writing():
    """What a rank of the fullest stage writes, a 32nd of its dense and a 16th of its expert
    parameters with 16 bytes each: two in bf16, the reference's two, 12 of the optimizer."""
    job = planned()
    copied = max(rank.host["checkpoint being written"] for rank in JobEstimate(job).ranks)
    assert copied == 16 * (283_967_488 // 32 + 5_637_144_576 // 16)
    copy = copied / (0.78 * 55e9)
    assert checkpoint_time(job).number == pytest.approx(copy / 5)
    synchronous = checkpoint_time(planned(checkpoint__asynchronous=False, checkpoint__every=2))
    assert synchronous.number == pytest.approx((copy + copied / 0.25e9) / 2)


def test_a_rank_stalls_at_every_hop_of_the_pipeline():
    """2 chunks x 16 micro-batches x 2 directions; a micro-batch's states of 7,168 values in bf16,
    over context 2 and tensor 4, through the network but for the 8 of 2,048 ranks in a node."""
    job = real_job()
    times = StepTime(job, EngineMemory(job))
    tokens = 32 * 8704 / 16 / 8
    hop = 200e-6 + tokens * 7168 * 2 * (1 - 8 / 2048) / (0.78 * 50e9)
    assert times.hop_seconds == pytest.approx(hop)
    assert times.pipeline_stall_seconds(True) == pytest.approx(4 * hop)
    stalled = time_section(times)["pipeline stalls"]
    assert stalled.number == pytest.approx(64 * hop) and "64 hops" in stalled.formula
    rank = times.busiest_rank
    micro = (
        times.compute_seconds(rank, True)
        + times.exposed_communication_seconds(rank, True)
        + 4 * hop
    )
    assert times.microbatch_seconds(rank, True) == pytest.approx(micro)
    assert (
        StepTime(real_job(pipeline=1, virtual_pipeline=1, pipeline_layout=None), None).hop_seconds
        == 0
    )


def test_a_step_is_the_sum_of_its_parts():
    section = time_section(JobEstimate(planned()).times)
    names = ("rollout", "routed experts", "scoring", "training")
    names += ("push", "load", "sleep and wake", "saves")
    assert section["step"].number == pytest.approx(sum(section[n].number for n in names))
