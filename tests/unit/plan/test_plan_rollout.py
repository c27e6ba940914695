"""Engines' memory and speed, against published caches and by hand."""

from dataclasses import replace

import pytest
from planned_jobs import BY_HAND, LLAMA_405B, QWEN_72B, RECIPE, V3, planned, real_job

from megatron_r1 import config as configuration
from megatron_r1.models.memory import cache_bytes_per_token
from megatron_r1.plan.engine_memory import EngineMemory, rollout_section
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import push_section
from megatron_r1.plan.rollout import RolloutTime
from megatron_r1.plan.sample_traffic import samples_section


def test_an_fp8_decoding_step_skips_idle_experts_of_one_byte_a_value():
    engines = EngineMemory(planned(push__fp8=True))
    time = RolloutTime(engines)
    read = [time._weights_read(sequences) for sequences in (0, 1e6)]
    assert read[1] == pytest.approx(engines.weight_bytes)
    routed = time.counts.num_routed + time.counts.mtp_routed  # the drafter's experts too
    assert read[1] - read[0] == pytest.approx(routed / 128)


def test_each_gpu_holds_its_copies_of_experts_and_reads_those_that_have_tokens():
    """128 copies of each layer's 256 experts on 128 GPUs: one more of 3 matrices of 7,168 x 2,048 a
    layer, in 58 layers and the drafting MTP layer. A token goes to 8 of 384."""
    expert = 59 * 3 * 7168 * 2048 * 2
    plain, copied = (EngineMemory(planned(rollout__redundant_experts=n)) for n in (0, 128))
    assert copied.weight_bytes == plain.weight_bytes + expert
    assert str(rollout_section(copied)["weights"]) == "24.69 GiB"
    balancer = sum(copied.buffers.values())
    assert plain.cache_bytes - copied.cache_bytes == expert + balancer
    for engines, held in ((plain, 2), (copied, 3)):  # one sequence and its draft on 16 groups
        idle = held * expert * (1 - 8 / (128 * held)) ** 32
        assert RolloutTime(engines)._weights_read(1) == pytest.approx(engines.weight_bytes - idle)
    in_fp8, without = (
        push_section(planned(rollout__redundant_experts=n))["in FP8"].value for n in (128, 0)
    )
    assert in_fp8 - without == expert / 2 + 59 * 3 * 56 * 16 * 4  # and a scale for 128 x 128


def test_a_pass_with_a_draft_takes_one_layer_more_and_gives_more_tokens():
    """By hand, where only latencies count: 5 ms of the host, 61 layers and those of MTP.

    A layer takes 230 us and two sums along NCCL's tree; all but 3 gather and scatter tokens around
    its ring; 85% accepted."""
    rates = dict.fromkeys(("memory_bandwidth", "bf16", "nvlink", "network"), 1e30)
    no_limits = replace(HARDWARE["H800"], **rates)
    sums, exchange = 2 * (6.8 + 2 * 7 * 0.6), 2 * (6.6 + 112 + 15 * 2.7)
    for tokens, accepted in ((1, 1.85), (2, 1.85 + 0.85**2), (0, 1)):
        layers = 61 + tokens
        expected = (5e3 + layers * (230 + sums) + (layers - 3) * exchange) * 1e-6 / accepted
        method = "mtp" if tokens else "none"
        job = planned(rollout__speculative={"method": method, "tokens": tokens or 1})
        time = RolloutTime(EngineMemory(replace(job, hardware=no_limits)))
        assert time.step_seconds(32) == pytest.approx(expected)
    ngram = EngineMemory(planned(rollout__speculative={"method": "ngram", "tokens": 4}))
    assert "rollout.speculative.method=ngram" in RolloutTime(ngram).seconds()[1]


def test_sampling_without_a_trainer_has_no_fp8_push():
    changed = {"push.fp8": True, "push.transport": "cuda_ipc"}
    config = configuration.load_recipe(RECIPE, BY_HAND | changed)
    engines = EngineMemory(PlannedJob(V3, config, 2048, HARDWARE["H800"], verb="sample"))
    assert (
        engines.weight_bytes == EngineMemory(planned()).weight_bytes
        and not engines.receive_buffer_bytes
    )


def test_an_engine_that_takes_more_of_a_gpu_than_the_trainer_leaves_is_named():
    most = JobEstimate(planned()).sections()["engine memory of a GPU"]["share, at most"]
    assert str(most) == "77.0%"
    (problem,) = JobEstimate(planned(rollout__gpu_memory=0.9)).problems()
    assert problem.startswith("rollout.gpu_memory=0.9: ") and "0.77" in problem
    less = JobEstimate(planned(rollout__gpu_memory=0.5)).engines
    used = less.weight_bytes + less.pass_bytes()
    assert less.cache_bytes == round(0.5 * HARDWARE["H800"].memory - 3 * GIB - used)


@pytest.mark.parametrize(
    "hf_config, num_bytes", [(V3, 70_272), (QWEN_72B, 327_680), (LLAMA_405B, 516_096)]
)
def test_the_cache_of_a_token_is_the_published_one(hf_config, num_bytes):
    # arXiv 2505.09343, table 1: bf16.
    assert cache_bytes_per_token(hf_config) == num_bytes


def test_a_rollout_s_routing_is_58_layers_of_8_experts_a_token():
    sent = samples_section(real_job())
    assert sent["routed experts"].value == 8192 * 8704 * 58 * 8
    assert sent["ids, log-probabilities"].value == 8192 * (8704 + 8192) * 4


def test_room_for_less_than_one_sequence_is_no_room():
    config = configuration.load_recipe(RECIPE, {"rollout.gpu_memory": None})
    job = PlannedJob(V3, config, 128, HARDWARE["H800"], verb="sample")
    full = EngineMemory(job)
    one_sequence = full.token_bytes * (512 + 8192 / 2)
    for part, seconds in ((0.9, False), (1.1, True)):
        left = full.cache_bytes - 3 * GIB  # the trainer's part of what is reserved
        engines = EngineMemory(job, trainer_bytes=round(left - part * one_sequence))
        found = RolloutTime(engines).seconds()[0]
        assert (found is not None) == bool(engines.mean_concurrency) == seconds, part
