"""Push plans against brute force, against Megatron's own rank generator, and at the real size."""

from collections import Counter
from math import prod

import numpy as np
import pytest
from refusals import raised, refused

from megatron_r1.base.errors import Cause
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.models.weights.layout import stage_shards
from megatron_r1.push.matching import EngineLayout, MatchedRegions, TrainerGrid
from megatron_r1.push.matching.planned_links import engine_sets, plan_sets
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.tensors import fp8_bytes, plain_bytes
from tests.unit.push.plan_worlds import DEEPSEEK_V3, WORLDS
from tests.unit.push.push_models import DEEPSEEK_MTP, QWEN
from tools.bench.push.small_model import rank_coordinate


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("hf_config", "grid", "engines"), WORLDS)
def test_the_ranks_of_an_engine_together_need_every_element_and_drafters_their_layers(
    hf_config, grid, engines, drafts
):
    # The trainer has MTP layers in any case; only engines that draft need them.
    stages = stage_shards(hf_config, grid.pipeline)
    sharding = PredictedSharding(hf_config, engines, drafts=drafts)
    matched_regions = MatchedRegions(hf_config, grid, engines, stages, sharding)
    (plan,) = plan_sets(matched_regions, plain_bytes("bfloat16"), [range(engines.engines)])
    whole = {}
    for engine_rank in plan:
        needed = {}
        for item, region, _ in (each for link in engine_rank for each in link.regions):
            shape = (item.shape[0], prod(item.shape[1:]))
            mask = needed.setdefault(item.name, np.zeros(shape, int))
            mask[region.top : region.bottom, region.left : region.right] += 1
        for name, mask in needed.items():
            assert mask.max() == 1, (name, "an element is sent twice")
            whole[name] = whole.get(name, 0) + mask
    assert all(mask.min() >= 1 for mask in whole.values())
    layers = {n.split(".")[2] for n in whole if n.startswith("model.layers.")}
    drafting = hf_config.get("num_nextn_predict_layers", 0) if drafts else 0
    assert layers == {str(i) for i in range(hf_config["num_hidden_layers"] + drafting)}


def test_ranks_are_where_megatron_puts_them():
    from megatron.core.parallel_state import RankGenerator

    grid = TrainerGrid(32, tensor=2, pipeline=2, context=2, expert=4, expert_tensor=1)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=2, ep=1, dp=4, pp=2, cp=2, order=order)
    expert = RankGenerator(tp=1, ep=4, dp=4, pp=2, cp=1, order=order)
    replicas = {tuple(grid.dense_replicas(s, t)) for s in range(2) for t in range(2)}
    assert replicas == {tuple(ranks) for ranks in dense.get_ranks("dp-cp")}
    replicas = {tuple(grid.expert_replicas(s, 0, e)) for s in range(2) for e in range(4)}
    assert replicas == {tuple(ranks) for ranks in expert.get_ranks("dp")}
    stages = {tuple(grid.unsplit_replicas(s)) for s in range(2)}
    assert stages == {tuple(sorted(ranks)) for ranks in dense.get_ranks("tp-cp-dp")}
    for rank in range(32):
        at = rank_coordinate(grid, rank)
        assert rank in grid.dense_replicas(at.stage, at.tensor)
        assert rank in grid.expert_replicas(at.stage, at.expert_tensor, at.expert)


def test_vllm_s_pipeline_stages():
    from vllm.distributed.utils import get_pp_indices

    from megatron_r1.push.matching.predicted_sharding import stage_layers

    for layers, stages in [(61, 4), (61, 16), (7, 3), (4, 1)]:
        expected = [range(*get_pp_indices(layers, s, stages)) for s in range(stages)]
        assert stage_layers(layers, stages) == expected


def test_sizes_that_cannot_be_are_named():
    with raised(ValueError, "parallel", 8, 3):
        TrainerGrid.from_recipe(ParallelConfig(tensor=3), 8)
    with refused("rollout.tensor_parallel", Cause.INDIVISIBLE, 3, "num_attention_heads=4"):
        MatchedRegions(DEEPSEEK_MTP, TrainerGrid(1), EngineLayout(tensor_parallel=3))
    with refused("parallel.expert", Cause.INDIVISIBLE, 3, 8):
        MatchedRegions(DEEPSEEK_MTP, TrainerGrid(3, expert=3), EngineLayout())


@pytest.mark.more
def test_deepseek_v3_from_2048_ranks_to_64_engines_moves_the_least_and_evenly():
    grid = TrainerGrid(2048, pipeline=16, expert=64)
    engines = EngineLayout(64, tensor_parallel=16, expert_parallel=True)
    stages = "Etttt|" + "tttt|" * 14 + "tL"
    chunks = stage_shards(DEEPSEEK_V3, 16, pipeline_layout=stages, with_mtp=False)
    matched_regions = MatchedRegions(DEEPSEEK_V3, grid, engines, chunks)
    experts = 58 * 256 * 3 * 7168 * 2048
    every_rank = 61 * (1536 * 7168 + 576 * 7168 + 2 * 7168 + 1536 + 512) + 7168  # never split
    every_rank += 58 * 256 * 7168
    split = 61 * 128 * (192 * 1536 + 256 * 512 + 128 * 7168) + 2 * 129_280 * 7168
    split += 3 * 3 * 7168 * 18432 + 58 * 3 * 7168 * 2048
    bias = 58 * 256 * 4
    needed = 2 * ((experts + split) / 16 + every_rank) + bias
    received, busiest = {}, {}
    for form, count in (("bf16", plain_bytes("bfloat16")), ("FP8", fp8_bytes)):
        plans = plan_sets(matched_regions, count, engine_sets(64))
        received[form] = [
            [sum(link.num_bytes for link in engine_rank) for engine_rank in plan] for plan in plans
        ]
        sent = Counter()
        for link in (link for plan in plans for engine_rank in plan for link in engine_rank):
            sent[link.trainer_rank] += link.num_bytes
        busiest[form] = max(sent.values()) / (sum(sent.values()) / 2048)
    np.testing.assert_allclose(received["bf16"], needed)
    assert max(busiest.values()) < 1.25
    # Projections are half as large, plus 4 bytes for 16,384 numbers; the rest stays in bf16.
    assert np.sum(received["FP8"]) / np.sum(received["bf16"]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("vocabulary", "splits"), [(1000, False), (1150, True)])
def test_a_vocabulary_that_vllm_cannot_split_is_refused(vocabulary, splits):
    """vLLM pads it to a multiple of 64, here 1024 and 1152, and asserts that ranks divide that."""
    layout = EngineLayout(tensor_parallel=3)
    changes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    hf_config = QWEN | changes | {"intermediate_size": 192, "vocab_size": vocabulary}
    sharding = PredictedSharding(hf_config, layout)
    embedding = next(sharding.tensors(layout.coordinate(0)))
    if splits:
        heights = [sharding.region(embedding, layout.coordinate(rank)).bottom for rank in range(3)]
        assert heights == [384, 768, 1150]
        return
    with refused("rollout.tensor_parallel", Cause.INDIVISIBLE, 3, "model.embed_tokens", 1024):
        sharding.region(embedding, layout.coordinate(0))


def test_copies_of_experts_stand_behind_all_experts():
    layout = EngineLayout(
        tensor_parallel=2, data_parallel=2, expert_parallel=True, redundant_experts=4
    )
    predicted = PredictedSharding(DEEPSEEK_MTP, layout)
    experts = predicted.weight_table.num_experts
    found = [expert for rank in range(4) for expert in predicted._experts_on(rank)]
    # As `build_initial_global_physical_to_logical_map` of vLLM's `EplbState` has them.
    assert found == [*range(experts), 0, 1, 2, 3]
    on_last = {item.expert for item, _ in predicted.regions_of(layout.coordinate(3))} - {None}
    assert on_last == set(found[-(len(found) // 4) :])
