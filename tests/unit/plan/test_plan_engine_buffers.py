"""What engines hold besides weights and cache, and what vLLM's balancer moves, by hand.

DeepSeek-V3 has 256 experts of three matrices of 7,168 x 2,048 in each of 58 layers and in the
drafting MTP layer; with 128 copies each of an engine's 128 GPUs has 3 of a layer's 384."""

import pytest
from planned_jobs import planned

from megatron_r1.plan.engine_memory import EngineMemory, rollout_section
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB
from megatron_r1.plan.push_costs import push_section
from megatron_r1.plan.timing import time_section

EXPERT = 3 * 7168 * 2048 * 2
COPIES = {"rollout__redundant_experts": 128}
POOLS = {"rollout_gpus": 2048, "rollout__colocated": False, "rl__staleness": 1}
LOW_LATENCY = {"all2all_backend": "deepep_low_latency"}


def balancer(layers: int, window: int = 1000, experts_in_fp8: bool = False) -> int:
    """vLLM's tensors of a network with so many layers of experts.

    Of a layer, in int64 the slots of each expert, of 1,024 at most, their number, its last load,
    and the expert of each slot; in int32 the load of each slot in this pass and in the last ones;
    and a layer's 3 experts."""
    maps = 256 * 1024 + 256 + 256 + 384
    loads = 384 + window * 384
    expert = EXPERT // 2 + 3 * 56 * 16 * 4 if experts_in_fp8 else EXPERT
    return 3 * expert + layers * (8 * maps + 4 * loads)


def test_a_balancer_takes_its_maps_and_a_layer_of_the_model_and_of_the_drafter():
    engines = EngineMemory(planned(**COPIES))
    assert engines.buffers == {"balancer of experts": balancer(58) + balancer(1)}
    assert str(rollout_section(engines)["balancer of experts"]) == "708.92 MiB"
    without = EngineMemory(planned())
    assert without.buffers == {}
    more = engines.weight_bytes - without.weight_bytes + sum(engines.buffers.values())
    assert without.cache_bytes - engines.cache_bytes == more
    alone = planned(**COPIES, rollout__speculative__method="none")
    assert sum(EngineMemory(alone).buffers.values()) == balancer(58)
    changed = planned(**COPIES, rollout__vllm={"eplb_config": {"window_size": 100}}, push__fp8=True)
    expected = balancer(58, 100, experts_in_fp8=True) + balancer(1, 100, experts_in_fp8=True)
    assert sum(EngineMemory(changed).buffers.values()) == expected


def test_engines_that_do_not_sleep_move_experts_after_every_push():
    """All three of each of 59 layers, at 1.6 GB/s by gloo, and at 78% of 55 GB/s to the host and
    back."""
    moved = 59 * 3 * EXPERT
    estimate = JobEstimate(planned(**COPIES, **POOLS, rollout__gpu_memory=0.6))
    section = time_section(estimate.times)
    seconds = moved / 1.6e9 + 2 * moved / (0.78 * 55e9)
    moves = section["expert moves"]
    assert moves.number == pytest.approx(seconds) == pytest.approx(10.47, abs=0.01)
    assert (moves.low, moves.high) == (
        pytest.approx(seconds / 1.96),
        pytest.approx(seconds * 1.96),
    )
    assert section["step"].formula.startswith("push + load + expert moves + ")
    bytes_row = estimate.sections()["push"]["experts moved"]
    assert bytes_row.value == moved and "after every push" in bytes_row.formula
    narrowing = estimate.sections()["what would narrow the ranges"]
    assert "preflight" in narrowing["expert moves"].formula
    # Over the links between GPUs: 120 of 128 are behind 50 GB/s of network.
    by_nixl = {"eplb_config": {"communicator": "nixl"}}
    direct = JobEstimate(planned(**COPIES, **POOLS, rollout__vllm=by_nixl)).times
    expected = moved * (120 / 128) / (0.78 * 50e9)
    assert time_section(direct)["expert moves"].number == pytest.approx(expected)


def test_engines_that_sleep_begin_with_the_places_of_a_push():
    estimate = JobEstimate(planned(**COPIES))
    assert "expert moves" not in time_section(estimate.times)
    row = estimate.sections()["push"]["experts moved"]
    assert row.value == 59 * 3 * EXPERT and "3,000 passes" in row.formula
    assert "a push, which resets their places, none" in row.formula
    assert "experts moved" not in push_section(planned())


@pytest.mark.parametrize(
    ("vllm", "copies", "network"),
    [
        # Twice sent and twice received: for each expert 256 tokens of 7,168 values in bf16, and
        # four bytes a 128 of them.
        (LOW_LATENCY, 0, 4 * 256 * 256 * (7168 * 2 + 56 * 4)),
        (LOW_LATENCY | {"max_num_batched_tokens": 128}, 128, 4 * 384 * 128 * (7168 * 2 + 56 * 4)),
        (LOW_LATENCY | {"max_num_batched_tokens": 64}, 0, 4 * 256 * 64 * (7168 * 2 + 56 * 4)),
        ({"all2all_backend": "deepep_high_throughput", "max_num_batched_tokens": 512}, 0, GIB),
    ],
)
def test_deepep_s_buffers_are_the_engine_s_and_stay_while_it_sleeps(vllm, copies, network):
    settings = {"rollout__redundant_experts": copies, "rollout__gpu_memory": 0.76}
    plain, estimate = (
        JobEstimate(planned(**settings, rollout__vllm=arguments)) for arguments in ({}, vllm)
    )
    buffers = GIB + network + 32 * 2**20
    assert estimate.engines.buffers["DeepEP's buffers"] == buffers
    left = [one.engines.cache_bytes + one.engines.pass_bytes() for one in (plain, estimate)]
    assert left[0] - left[1] == buffers
    for rank, without in zip(estimate.ranks, plain.ranks, strict=True):
        assert rank.training["DeepEP's buffers"] == rank.logprobs["DeepEP's buffers"] == buffers
        assert rank.peak_bytes - without.peak_bytes == buffers
    assert estimate.problems() == []
    # They are of the share that the engines' setting names, and not the trainer's.
    share = "share, at most"
    assert rollout_section(estimate.engines)[share].value == (
        rollout_section(plain.engines)[share].value
    )
    alone = JobEstimate(planned(**settings, **POOLS, rollout__vllm=vllm))
    assert "DeepEP's buffers" not in alone.peak_rank.training
    assert alone.engines.buffers["DeepEP's buffers"] == buffers


def test_engines_without_an_exchange_or_in_one_node_have_fewer_buffers():
    nccl = {"all2all_backend": "allgather_reducescatter"}
    apart = planned(rollout__vllm=LOW_LATENCY, rollout__expert_parallel=False)
    for job in (planned(rollout__vllm=nccl), apart):
        assert EngineMemory(job).buffers == {}
    high = {"all2all_backend": "deepep_high_throughput"}
    node = planned(rollout__vllm=high, rollout__engines=256, rollout__data_parallel=1)
    assert EngineMemory(node).buffers == {}
    node = planned(
        rollout__vllm=high,
        rollout__engines=256,
        rollout__tensor_parallel=4,
        rollout__data_parallel=2,
    )
    assert EngineMemory(node).buffers == {"DeepEP's buffers": GIB + 32 * 2**20}


def test_the_recipe_s_tokens_of_a_pass_are_too_many_for_low_latency():
    """8,192 tokens for each of 256 experts: 122 GB, of which the remedy names the cause."""
    vllm = LOW_LATENCY | {"max_num_batched_tokens": 8192}
    trainer, cache, *_ = JobEstimate(planned(rollout__vllm=vllm)).problems()
    remedy = "lower max_num_batched_tokens of rollout.vllm"
    assert "of it DeepEP's buffers: " in trainer and trainer.endswith(remedy)
    assert "of DeepEP's buffers" in cache and f": {remedy}, or " in cache
