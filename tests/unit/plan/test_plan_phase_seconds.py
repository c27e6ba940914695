"""Seconds between the phases of a step, and of the pipeline's hops, by hand."""

from dataclasses import replace

import pytest
from planned_jobs import planned, real_job

from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB
from megatron_r1.plan.step_time import StepTime
from megatron_r1.plan.timing import checkpoint_time, sleep_wake_time, time_section, weight_load_time


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
    """What a rank of the fullest stage writes: 16 bytes each of its share of the parameters.

    It writes a 32nd of its dense and a 16th of its expert parameters: two bytes in bf16, the
    reference's two, 12 of the optimizer; and four layers' routing biases in fp32, twice."""
    job = planned()
    copied = max(rank.host["checkpoint being written"] for rank in JobEstimate(job).ranks)
    assert copied == 16 * (283_967_488 // 32 + 5_637_144_576 // 16) + 2 * 4 * (4 * 256)
    copy = copied / (0.78 * 55e9)
    assert checkpoint_time(job).number == pytest.approx(copy / 5)
    synchronous = checkpoint_time(planned(checkpoint__asynchronous=False, checkpoint__every=2))
    assert synchronous.number == pytest.approx((copy + copied / 0.25e9) / 2)


def test_a_rank_waits_for_the_bytes_of_every_hop_of_the_pipeline():
    """2 chunks x 16 micro-batches x 2 directions.

    A micro-batch's states of 7,168 values in bf16, over context 2 and tensor 4, go through the
    network but for the 8 of 2,048 ranks in a node. Shapes are known, and the experts that tokens go
    to are replayed, so that the host waits for nothing."""
    job = real_job()
    times = StepTime(job, EngineMemory(job))
    tokens = 32 * 8704 / 16 / 8
    hop = tokens * 7168 * 2 * (1 - 8 / 2048) / (0.78 * 50e9)
    assert times.hop_seconds == pytest.approx(hop)
    assert times.pipeline_stall_seconds(True) == pytest.approx(4 * hop)
    stalled = time_section(times)["pipeline stalls"]
    assert stalled.number == pytest.approx(64 * hop) and "64 hops" in stalled.formula
    assert stalled.low == pytest.approx(64 * hop / 1.96)
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


def seconds_of(job):
    """Seconds of a micro-batch's update, of an optimizer step's and of a rollout's logprobs, and
    the layers of experts of the busiest rank."""
    times = StepTime(job, EngineMemory(job))
    rank = times.busiest_rank
    sparse = sum(n >= 3 for chunk in job.pipeline_stages[rank] for n in chunk.layers)
    return times.microbatch_seconds(rank, True), times.logprobs_seconds(), sparse


def test_the_host_waits_once_in_a_layer_whose_counts_it_does_not_know():
    """Without replay in updates and in the passes of both policies, with it in the reference's.

    The reference's routers choose themselves; 256 micro-batches of a rollout take 1 / (1 - bubble)
    as long: 2 x 256 + 15 slots for 2 x 256."""
    jobs = [planned(rl__routing_replay=value) for value in (True, False)]
    (replayed, logprobs, sparse), (routed, own_logprobs, _) = map(seconds_of, jobs)
    wait = sparse * 200e-6
    assert sparse == 4 and routed - replayed == pytest.approx(wait)
    of_a_pass = wait * 256 * (512 + 15) / 512
    assert own_logprobs - logprobs == pytest.approx(of_a_pass)
    no_reference = {"rl__kl_beta": 0.0}
    alone, own_alone = (
        seconds_of(planned(rl__routing_replay=value, **no_reference))[1] for value in (True, False)
    )
    assert own_alone - alone == pytest.approx(of_a_pass)
    assert logprobs == pytest.approx(2 * alone + of_a_pass)
    assert "the host waits 0.2 s" in time_section(JobEstimate(jobs[0]).times)["logprobs"].formula
    update = time_section(JobEstimate(jobs[1]).times)["optimizer step"].formula
    assert "0.0008 s waits of the host" in update


def test_deepep_s_dispatch_and_plain_megatron_wait_for_counts_they_could_know():
    """A layer that is recomputed dispatches again; plain Megatron also waits in every hop."""
    without = {"rl__routing_replay": False}
    ours = planned(**without)
    plain = replace(ours, plain_megatron=True)
    selective = plain.with_parallel(recompute="selective")
    found = StepTime(ours, EngineMemory(ours))
    of_plain = StepTime(plain, EngineMemory(plain))
    of_selective = StepTime(selective, EngineMemory(selective))
    wait = 4 * 200e-6
    rank = found.busiest_rank
    assert found.host_wait_seconds(rank, True) == pytest.approx(wait)
    assert of_plain.host_wait_seconds(rank, True) == pytest.approx(2 * wait)
    assert of_plain.host_wait_seconds(rank, False) == pytest.approx(wait)
    assert of_selective.host_wait_seconds(rank, True) == pytest.approx(wait)
    assert of_plain.hop_seconds == pytest.approx(found.hop_seconds + 200e-6)
    flex = StepTime(planned(parallel__dispatcher="flex"), None)
    assert flex.host_wait_seconds(rank, True) == pytest.approx(2 * wait)


def test_a_step_is_the_sum_of_its_parts():
    section = time_section(JobEstimate(planned()).times)
    names = ("rollout", "routed experts", "logprobs", "training")
    names += ("push", "load", "sleep and wake", "saves")
    assert section["step"].number == pytest.approx(sum(section[n].number for n in names))
