"""What a trainer that is away between its phases leaves its engines, by hand.

Pipeline rank 3 of the 671B recipe has 283,967,488 dense and 5,637,144,576 expert parameters in
bf16, with 12 bytes of optimizer state for each on one of 32 and 16 replicas (docs/plan.md); the
first rank has 0.4% more."""

from dataclasses import replace
from pathlib import Path

import pytest
from planned_jobs import planned

from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import Calibration
from megatron_r1.plan.memory import rank_memory
from megatron_r1.plan.time_ranges import narrowing_section
from megatron_r1.plan.timing import time_section

DENSE, EXPERT = 283_967_488, 5_637_144_576
OFFLOADED = 2 * (DENSE + EXPERT) + 12 * (DENSE / 32 + EXPERT / 16)
GIB = 2**30


def estimate(place: str, **more) -> JobEstimate:
    return JobEstimate(planned(parallel__offload_between_phases=place, **more))


def value(of: JobEstimate, section: str, name: str) -> float:
    return of.sections()[section][name].value


@pytest.mark.more
def test_the_engines_may_take_what_is_away():
    here, away = estimate("none"), estimate("host")
    assert here.engines.trainer_bytes == pytest.approx(OFFLOADED, rel=5e-3)
    # The routers' bias of a rank, which is no parameter.
    assert 0 < away.engines.trainer_bytes < 1e-6 * OFFLOADED
    assert away.engines.free_bytes - here.engines.free_bytes == pytest.approx(OFFLOADED, rel=5e-3)
    more = {"rollout__gpu_memory": 0.9}
    assert "rollout.gpu_memory" in estimate("none", **more).problems()[0]
    assert estimate("host", **more).problems() == estimate("disk", **more).problems() == []
    cache = value(estimate("host", **more), "engine memory of a GPU", "KV cache")
    gain = (0.9 - planned().config.rollout.gpu_memory) * 79 * GIB
    assert cache - value(here, "engine memory of a GPU", "KV cache") == pytest.approx(gain, abs=1)


def test_training_and_logprobs_need_as_much_as_without():
    for here, away in zip(estimate("none").ranks, estimate("host").ranks, strict=True):
        assert away.training == here.training and away.logprobs == here.logprobs


@pytest.mark.more
def test_a_node_holds_it_in_memory_or_on_its_disk():
    kind, host = "offloaded while engines sample", "host memory of a node"
    assert value(estimate("host"), host, kind) == pytest.approx(8 * OFFLOADED, rel=5e-3)
    disk = estimate("disk")
    assert value(disk, "local disk of a node", kind) == pytest.approx(8 * OFFLOADED, rel=5e-3)
    assert kind not in disk.sections()[host]
    assert "local disk of a node" not in estimate("host").sections()


@pytest.mark.more
@pytest.mark.parametrize(("place", "rate"), [("host", 55e9 * 0.78), ("disk", 12e9 / 8)])
def test_a_step_waits_for_both_ways_and_a_fifth_of_a_checkpoint(place, rate):
    here, away = estimate("none"), estimate(place)
    push = value(here, "time", "push")
    once = 2 * OFFLOADED / rate
    seconds = value(away, "time", "offload")
    assert seconds == pytest.approx(once + (once + push) / 5, rel=5e-3)
    assert value(away, "time", "step") - value(here, "time", "step") == pytest.approx(seconds)
    assert "offload" not in here.sections()["time"]


@pytest.mark.parametrize(
    ("place", "number", "named"),
    [("host", "host_link", "tools/gpu_check"), ("disk", "local_disk", "no check measures it")],
)
def test_its_seconds_have_a_range_until_the_link_is_measured(place, number, named):
    job = planned(parallel__offload_between_phases=place)
    section = time_section(JobEstimate(job).times)
    offload = section["offload"]
    assert offload.low == pytest.approx(offload.number / 1.96)
    assert offload.high == pytest.approx(offload.number * 1.96)
    assert named in narrowing_section(job, section)["offload"].formula
    without = time_section(JobEstimate(planned()).times)["step"]
    assert section["step"].high == pytest.approx(without.high + offload.high)
    calibration = Calibration(Path("measured.yaml"), frozenset({number}))
    measured = time_section(JobEstimate(replace(job, calibration=calibration)).times)
    assert measured["offload"].limits == ""


def test_the_critic_s_state_is_away_too():
    ppo = {"rl__algorithm": "ppo", "rl__advantage_std": "batch", "rollout__gpu_memory": None}
    here, away = (
        rank_memory(planned(parallel__offload_between_phases=place, **ppo))[3]
        for place in ("none", "host")
    )
    kind = "offloaded while engines sample"
    assert here.resident_bytes > 1.5 * OFFLOADED and away.resident_bytes < 1e-6 * OFFLOADED
    assert away.host[kind] == pytest.approx(here.resident_bytes, rel=5e-3)
