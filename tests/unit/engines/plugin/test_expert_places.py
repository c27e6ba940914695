"""Where an engine rank's experts are is known while the engine sleeps."""

from types import SimpleNamespace

import pytest
import torch


@pytest.mark.more  # for vLLM's imports
@pytest.mark.parametrize(("ranks", "expected"), [(1, [0, 1, 2, 3]), (2, [-1, -1, 0, 1])])
def test_experts_are_found_without_the_memory_of_their_map(ranks, expected):
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    from megatron_r1.engines.plugin import register

    register()
    parallel = {"use_ep": ranks > 1, "ep_size": ranks, "ep_rank": ranks - 1, "tp_size": 1}
    manager = ExpertMapManager(
        max_num_batched_tokens=8,
        top_k=1,
        global_num_experts=4,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=SimpleNamespace(**parallel, dp_size=ranks),
        placement_strategy="linear",
        enable_eplb=False,
    )
    if manager.expert_map is not None:
        manager._expert_map = torch.empty(4, dtype=torch.int32, device="meta")  # given away
    assert [manager.map_global_to_local(expert) for expert in range(4)] == expected
