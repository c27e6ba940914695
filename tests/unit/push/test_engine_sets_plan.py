"""Plans in which each slice enters one engine, against what single ranks hold and need."""

from collections import Counter, defaultdict

import pytest

from megatron_r1.models.weights.layout import stage_shards
from megatron_r1.push.matching import EngineLayout, MatchedRegions, TrainerGrid
from megatron_r1.push.matching.planned_links import (
    MAX_SET_ENGINES,
    engine_sets,
    plan_sets,
)
from megatron_r1.push.matching.tensors import fp8_bytes, plain_bytes
from tests.unit.push.plan_worlds import DEEPSEEK_V3, WORLDS, held
from tests.unit.push.push_models import DEEPSEEK_MTP

BYTES = plain_bytes("bfloat16")


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize(("hf_config", "grid", "layout"), WORLDS)
def test_each_rank_s_needs_enter_one_engine_once_from_a_holder(hf_config, grid, layout, engines):
    matched_regions = MatchedRegions(hf_config, grid, layout)
    (plan,) = plan_sets(matched_regions, BYTES, [range(engines)])
    holdings = [held(hf_config, grid, rank) for rank in range(grid.world_size)]
    assert len(plan) == layout.ranks_per_engine
    for engine_rank, of_position in enumerate(plan):
        found = Counter()
        for link in of_position:
            assert link.engine_rank == engine_rank and link.member in range(engines)
            for each in link.regions:
                own = holdings[link.trainer_rank][each.tensor.name]
                assert any(each.region.intersection(r) == each.region for r in own), each
                found[each.tensor.name, each.region] += 1
        assert set(found.values()) == {1}
        elements = defaultdict(int)
        for name, region in found:
            elements[name] += region.num_elements
        at = layout.coordinate(engine_rank)
        needed = {
            item.name: region.num_elements
            for item, region in matched_regions.sharding.regions_of(at)
        }
        assert elements == needed
        for one in (name for name, _ in found):
            regions = [region for name, region in found if name == one]
            for i, region in enumerate(regions):
                assert not any(region.intersection(other) for other in regions[:i])


def test_everyone_computes_the_same_plan():
    grid = TrainerGrid(8, pipeline=2, expert=4)
    layout = EngineLayout(tensor_parallel=2, data_parallel=2)
    plans = [
        plan_sets(MatchedRegions(DEEPSEEK_MTP, grid, layout), BYTES, [range(2), range(2, 4)])
        for _ in "ab"
    ]
    assert plans[0] == plans[1]


def test_engines_receive_equal_bytes_though_one_tensor_is_more_than_a_share():
    hf_config = DEEPSEEK_MTP | {"vocab_size": 1 << 15}
    matched_regions = MatchedRegions(
        hf_config, TrainerGrid(2, tensor=2), EngineLayout(1, tensor_parallel=2)
    )
    (plan,) = plan_sets(matched_regions, BYTES, [range(16)])
    for engine_rank in plan:
        received = Counter()
        for link in engine_rank:
            received[link.member] += link.num_bytes
        mean = sum(received.values()) / 16
        assert len(received) == 16 and max(received.values()) < 1.002 * mean


def test_sets_are_of_equal_size():
    assert engine_sets(1) == [range(1)]
    assert engine_sets(MAX_SET_ENGINES) == [range(MAX_SET_ENGINES)]
    assert [len(engines) for engines in engine_sets(MAX_SET_ENGINES + 1)] == [8, 9]
    assert engine_sets(64) == [range(0, 16), range(16, 32), range(32, 48), range(48, 64)]


@pytest.mark.more
@pytest.mark.parametrize(("count", "most"), [(BYTES, 1.13), (fp8_bytes, 1.18)])
def test_the_recipe_for_2048_ranks_needs_few_links_and_sends_evenly(count, most):
    grid = TrainerGrid(2048, tensor=4, context=2, expert=8, pipeline=16)
    layout = EngineLayout(16, tensor_parallel=8, data_parallel=16, expert_parallel=True)
    stages = stage_shards(DEEPSEEK_V3, 16, 2, pipeline_layout="Et|t|(tt|)*29tmL")
    matched_regions = MatchedRegions(DEEPSEEK_V3, grid, layout, stages)
    (plan,) = plan_sets(matched_regions, count, [range(16)])
    sent, into, received, entered = Counter(), Counter(), Counter(), Counter()
    for link in (link for of_position in plan for link in of_position):
        sent[link.trainer_rank] += link.num_bytes
        into[link.member, link.engine_rank] += 1
        entered[link.member, link.engine_rank] += link.num_bytes
        received[link.engine_rank] += link.num_bytes
    out = Counter(link.trainer_rank for of_position in plan for link in of_position)
    assert max(out.values()) <= 16 and max(into.values()) <= 10
    assert len(into) == 2048 and len(sent) == 2048
    assert max(sent.values()) <= most * sum(sent.values()) / 2048
    shares = [16 * entered[engine, p] / received[p] for engine in range(16) for p in range(128)]
    assert min(shares) > 0.99 and max(shares) < 1.002
    for engine_rank in range(128):
        needed = matched_regions.sharding.regions_of(layout.coordinate(engine_rank))
        num_bytes = sum(count(item.name, item.rule.dtype, region) for item, region in needed)
        # FP8 scales of rows that are cut count anew in each cut.
        assert received[engine_rank] == pytest.approx(num_bytes)
