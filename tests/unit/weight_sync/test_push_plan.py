"""Push plans against brute force, against Megatron's own rank generator, and at the real size."""

from collections import Counter
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
from refusals import raised, refused

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.errors import Cause
from megatron_r1.weight_sync.plan import EngineLayout, Planner, TrainerGrid
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.tensors import fp8_bytes, plain_bytes
from megatron_r1.weights.layout import stage_shards
from tests.unit.weight_sync.plan_worlds import DEEPSEEK_V3, WORLDS, held
from tests.unit.weight_sync.push_models import DEEPSEEK_MTP, QWEN
from tools.bench.push.direct_links import Transfer, direct_links, first_turn, sends


def receives(planner: Planner, rank: int) -> Iterator[Transfer]:
    """Yield the transfers to engine rank `rank`, from its own side of the plan."""
    at, engine = planner.engines.coordinate(rank), rank // planner.engines.ranks_per_engine
    for item in planner.needs.tensors(at):
        for holding in planner.holdings(item):
            needed = planner.needed_parts(item, holding.region)
            for index, (coordinate, region) in enumerate(needed):
                if coordinate == at:
                    turn = engine * len(needed) + index + first_turn(item.name)
                    sender = holding.replicas[turn % len(holding.replicas)]
                    dtype = item.rule.dtype
                    yield Transfer(item.name, item.shape, region, sender, rank, dtype)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("hf", "grid", "engines"), WORLDS)
def test_what_is_sent_is_what_is_received_and_each_element_comes_once_from_a_holder(
    hf, grid, engines, drafts
):
    # The trainer has MTP layers in any case; only engines that draft need them.
    stages, needs = stage_shards(hf, grid.pipeline), PredictedLayout(hf, engines, drafts=drafts)
    planner = Planner(hf, grid, engines, stages, needs)
    sent = Counter(t for rank in range(grid.world) for t in sends(planner, rank))
    received = Counter(t for rank in range(engines.num_ranks) for t in receives(planner, rank))
    assert sent == received and set(sent.values()) == {1}
    holdings = [held(hf, grid, rank) for rank in range(grid.world)]
    masks = {}
    for transfer in sent:
        own = holdings[transfer.sender][transfer.name]
        assert any(transfer.region.intersection(region) == transfer.region for region in own), (
            transfer
        )
        shape = (transfer.shape[0], prod(transfer.shape[1:]))
        mask = masks.setdefault((transfer.receiver, transfer.name), np.zeros(shape, int))
        at = transfer.region
        mask[at.top : at.bottom, at.left : at.right] += 1
    assert all(mask.max() == 1 for mask in masks.values()), "an element was sent twice"
    # Together the ranks of one engine have every element; a copy more where vLLM replicates.
    names = {name for _, name in masks}
    for engine in range(engines.engines):
        ranks = range(engine * engines.ranks_per_engine, (engine + 1) * engines.ranks_per_engine)
        for name in names:
            whole = sum(masks[rank, name] for rank in ranks if (rank, name) in masks)
            assert whole.min() >= 1, (engine, name)
    layers = {n.split(".")[2] for n in names if n.startswith("model.layers.")}
    drafting = hf.get("num_nextn_predict_layers", 0) if drafts else 0
    assert layers == {str(i) for i in range(hf["num_hidden_layers"] + drafting)}


@pytest.mark.parametrize(("hf", "grid", "engines"), WORLDS)
def test_links_of_all_ranks_are_those_of_each_rank_s_transfers(hf, grid, engines):
    planner, count = Planner(hf, grid, engines), plain_bytes("bfloat16")
    expected = Counter()
    for transfer in (t for rank in range(grid.world) for t in sends(planner, rank)):
        pair = transfer.sender, transfer.receiver
        expected[pair] += count(transfer.name, transfer.dtype, transfer.region)
    links = direct_links(planner, count)
    pairs = zip(links.sender.tolist(), links.receiver.tolist(), strict=True)
    assert dict(zip(pairs, links.num_bytes, strict=True)) == expected
    for side, found in enumerate((links.sender, links.receiver)):
        most = max(Counter(pair[side] for pair in expected).values())
        assert np.bincount(found).max() == most


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
    stages = {tuple(grid.whole_replicas(s)) for s in range(2)}
    assert stages == {tuple(sorted(ranks)) for ranks in dense.get_ranks("tp-cp-dp")}
    for rank in range(32):
        assert rank in grid.dense_replicas(grid.stage(rank), grid.tensor_rank(rank))
        assert rank in grid.expert_replicas(grid.stage(rank), *grid.expert_coordinate(rank))


def test_vllm_s_pipeline_stages():
    from vllm.distributed.utils import get_pp_indices

    from megatron_r1.weight_sync.plan.predicted_layout import stage_layers

    for layers, stages in [(61, 4), (61, 16), (7, 3), (4, 1)]:
        expected = [range(*get_pp_indices(layers, s, stages)) for s in range(stages)]
        assert stage_layers(layers, stages) == expected


def test_sizes_that_cannot_be_are_named():
    with raised(ValueError, "parallel", 8, 3):
        TrainerGrid.from_recipe(ParallelConfig(tensor=3), 8)
    with refused("rollout.tensor", Cause.INDIVISIBLE, 3, "num_attention_heads=4"):
        Planner(DEEPSEEK_MTP, TrainerGrid(1), EngineLayout(tensor=3))
    with refused("parallel.expert", Cause.INDIVISIBLE, 3, 8):
        Planner(DEEPSEEK_MTP, TrainerGrid(3, expert=3), EngineLayout())


def test_deepseek_v3_from_2048_ranks_to_64_engines_moves_the_least_and_evenly():
    grid = TrainerGrid(2048, pipeline=16, expert=64)
    engines = EngineLayout(64, tensor=16, expert_parallel=True)
    stages = "Etttt|" + "tttt|" * 14 + "tL"
    chunks = stage_shards(DEEPSEEK_V3, 16, pipeline_layout=stages, with_mtp=False)
    planner = Planner(DEEPSEEK_V3, grid, engines, chunks)
    experts = 58 * 256 * 3 * 7168 * 2048
    every_rank = 61 * (1536 * 7168 + 576 * 7168 + 2 * 7168 + 1536 + 512) + 7168  # never split
    every_rank += 58 * 256 * 7168
    split = 61 * 128 * (192 * 1536 + 256 * 512 + 128 * 7168) + 2 * 129_280 * 7168
    split += 3 * 3 * 7168 * 18432 + 58 * 3 * 7168 * 2048
    bias = 58 * 256 * 4
    moved = direct_links(planner, plain_bytes("bfloat16"))
    needed = 2 * ((experts + split) / 16 + every_rank) + bias
    np.testing.assert_allclose(moved.received, needed)
    assert moved.sent.sum() == pytest.approx(64 * 16 * needed)
    assert moved.busiest_sender < 1.2
    half = direct_links(planner, fp8_bytes)
    assert half.busiest_sender < 1.2
    # Projections are half as large, plus 4 bytes for 16,384 numbers; the rest stays in bf16.
    assert half.received.sum() / moved.received.sum() == pytest.approx(0.5, abs=0.01)
    # The transfers of single ranks add up to the same.
    for rank in (0, 700, 2047):
        own = sum(plain_bytes("bfloat16")(t.name, t.dtype, t.region) for t in sends(planner, rank))
        assert own == pytest.approx(moved.sent[rank])


@pytest.mark.parametrize(("vocabulary", "splits"), [(1000, False), (1150, True)])
def test_a_vocabulary_that_vllm_cannot_split_is_refused(vocabulary, splits):
    """vLLM pads it to a multiple of 64, here 1024 and 1152, and asserts that ranks divide that."""
    layout = EngineLayout(tensor=3)
    changes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    hf = QWEN | changes | {"intermediate_size": 192, "vocab_size": vocabulary}
    needs = PredictedLayout(hf, layout)
    embedding = next(needs.tensors(layout.coordinate(0)))
    if splits:
        heights = [needs.region(embedding, layout.coordinate(rank)).bottom for rank in range(3)]
        assert heights == [384, 768, 1150]
        return
    with refused("rollout.tensor", Cause.INDIVISIBLE, 3, "model.embed_tokens", 1024):
        needs.region(embedding, layout.coordinate(0))
