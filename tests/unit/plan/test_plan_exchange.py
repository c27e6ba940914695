"""Exchanges between an engine's GPUs, against DeepEP's and NCCL's published figures, by hand."""

from dataclasses import replace

import pytest
from planned_jobs import planned, real_job

from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.communication import traffic_by_axis
from megatron_r1.plan.engine_communication import (
    EngineInterconnect,
    ExpertExchange,
    mean_distinct_values,
)
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.plan.rollout import RolloutTime, exchange_section

H800 = HARDWARE["H800"]
WHOLE = replace(Assumptions(), link_efficiency=1.0)
LINKS = EngineInterconnect(H800, WHOLE)


def v3(ranks: int, value: int = 1) -> ExpertExchange:
    """DeepSeek-V3's exchange: 7,168 values of a token to 8 experts in at most 4 nodes."""
    return ExpertExchange(LINKS, ranks, hidden=7168, topk=8, max_nodes=4, value=value)


@pytest.mark.parametrize(
    ("ranks", "microseconds"), [(8, 77 + 114), (32, 155 + 273), (128, 192 + 369), (512, 194 + 360)]
)
def test_low_latency_has_the_times_of_deepep_s_table(ranks, microseconds):
    found = v3(ranks).seconds("deepep_low_latency", 128)
    assert found == pytest.approx(microseconds * 1e-6)
    # Between rows, half way along a doubling.
    if ranks == 128:
        between = v3(91).seconds("deepep_low_latency", 128)
        assert between == pytest.approx((173 + 314 + 192 + 369) / 2 * 1e-6, rel=0.01)


def test_low_latency_grows_with_tokens_and_values_but_not_below_its_start():
    """By hand: two starts of 6.6 + 2.7 us; what is beyond them, for 16 of 128 tokens."""
    start = 9.3e-6
    dispatch, combine = 192e-6 - start, 369e-6 - start
    few = v3(128).seconds("deepep_low_latency", 16)
    assert few == pytest.approx(2 * start + (dispatch + combine) / 8)
    in_bf16 = v3(128, value=2).seconds("deepep_low_latency", 16)
    assert in_bf16 == pytest.approx(2 * start + (2 * dispatch + combine) / 8)


def test_high_throughput_sends_a_token_once_to_each_node():
    """By hand: 64 ranks are 8 nodes, and V3's router sends to 4 at most; 51 GB/s; FP8 there, bf16
    back. In one node: 8 (1 - (7/8)^8) = 5.25 different GPUs, 153 GB/s."""
    over_nodes = 4096 * 4 * 7168 * 3 / 51e9
    assert v3(64).seconds("deepep_high_throughput", 4096) == pytest.approx(over_nodes + 200e-6)
    assert mean_distinct_values(8, 8) == pytest.approx(5.251, abs=1e-3)
    in_node = 4096 * 5.251 * 7168 * 3 / 153e9
    found = v3(8).seconds("deepep_high_throughput", 4096)
    assert found == pytest.approx(in_node + 200e-6, rel=1e-4)


def test_nccl_gathers_all_tokens_around_its_ring():
    """By hand, LL over 128 ranks on 16 nodes: a start, 112 steps within nodes, 15 between. 400 GB/s
    of a node's adapters are more than a GPU's 200 GB/s of NVLink."""
    latency = (6.6 + 112 * 1.0 + 15 * 2.7) * 1e-6
    assert v3(128, value=2).seconds("allgather_reducescatter", 0) == pytest.approx(2 * latency)
    # Many tokens: LL128, with 92% of the rate.
    latency, gathered = (14 + 112 * 1.9 + 15 * 4) * 1e-6, 1000 * 128 * 7168 * 2
    each = latency + gathered * 127 / 128 / (0.92 * 200e9)
    found = v3(128, value=2).seconds("allgather_reducescatter", 1000)
    assert found == pytest.approx(2 * each)
    assert v3(128).seconds("another", 1000) == v3(128).seconds("allgather_reducescatter", 1000)
    assert v3(1).seconds("deepep_low_latency", 128) == 0


def test_a_sum_over_tensor_ranks_goes_along_nccl_s_tree():
    assert LINKS.all_reduce_seconds(1, 1e6) == 0
    assert LINKS.all_reduce_seconds(8, 0) == pytest.approx((6.8 + 2 * 7 * 0.6) * 1e-6)
    four_nodes = (6.8 + 2 * (7 * 0.6 + 2 * 5.0)) * 1e-6
    assert LINKS.all_reduce_seconds(32, 0) == pytest.approx(four_nodes)
    assert EngineInterconnect(H800, replace(WHOLE, link_efficiency=0.5)).all_reduce_seconds(
        8, 1e9
    ) == pytest.approx((14 + 2 * 7 * 1.25) * 1e-6 + 2 * 1e9 / (0.92 * 100e9))


def test_a_bill_shows_every_backend_and_engines_take_the_one_that_is_chosen():
    section = exchange_section(RolloutTime(EngineMemory(planned())))
    assert "the engines'" in section["allgather_reducescatter"].formula
    chosen = planned(rollout__vllm={"all2all_backend": "deepep_low_latency"})
    assert (
        "the engines'"
        in exchange_section(RolloutTime(EngineMemory(chosen)))["deepep_low_latency"].formula
    )
    passes = [RolloutTime(EngineMemory(job)).exchange_seconds(32) for job in (planned(), chosen)]
    # 58 of 61 layers and the MTP layer's have routed experts.
    each = [section[name].number for name in ("allgather_reducescatter", "deepep_low_latency")]
    assert passes[0] - passes[1] == pytest.approx(59 * (each[0] - each[1]))
    assert (
        exchange_section(RolloutTime(EngineMemory(planned(rollout__expert_parallel=False)))) == {}
    )


def test_engines_without_cuda_graphs_wait_for_the_host_in_every_layer():
    graphs, eager = planned(), planned(rollout__vllm={"enforce_eager": True})
    seconds = [RolloutTime(EngineMemory(job)).step_seconds(32) * 1.85 for job in (graphs, eager)]
    assert seconds[1] - seconds[0] == pytest.approx(62 * 1e-3)


def test_the_trainer_s_deepep_sends_a_token_once_to_each_rank_or_node():
    plain, flex = (traffic_by_axis(real_job(dispatcher=name), 3) for name in ("alltoall", "flex"))
    assert flex["expert"].forward_bytes == pytest.approx(
        plain["expert"].forward_bytes * mean_distinct_values(8, 8) / 8
    )
    wide = traffic_by_axis(real_job(dispatcher="flex", expert=64), 3)["expert"]
    all_to_all = traffic_by_axis(real_job(expert=64), 3)["expert"]
    assert wide.forward_bytes == pytest.approx(all_to_all.forward_bytes * 4 / 8)
