import re
from collections import defaultdict
from itertools import product

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.weights import Shard, hf_tensors, parameter_layout
from megatron_r1.models.weights.adapter_table import (
    adapter_shapes,
    adapter_table,
    check_adapters,
    target_modules,
)
from megatron_r1.models.weights.layout import layout_from_table

ATTENTION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 7}
QWEN = ATTENTION | {
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK = ATTENTION | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_attention_heads": 4,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
SOME = ["q_proj", "v_proj", "down_proj"]
DENSE = [(1, 1, 1), (2, 1, 1), (4, 1, 1)]
GRIDS = [*DENSE, (2, 1, 2), (2, 2, 1), (4, 1, 4)]
"""tensor, expert, expert-tensor."""


def ranks(tensor: int, expert: int, expert_tensor: int):
    for tp, ep, etp in product(range(tensor), range(expert), range(expert_tensor)):
        at = {"tp": (tp, tensor), "ep": (ep, expert), "etp": (etp, expert_tensor)}
        yield Shard(layers=(0, 1), **at)


@pytest.mark.parametrize(
    ("hf_config", "targets", "grid"),
    [
        *((QWEN, targets, grid) for targets in (None, SOME) for grid in DENSE),
        *((DEEPSEEK, None, grid) for grid in GRIDS),
    ],
)
def test_every_row_and_column_of_a_factor_has_one_owner_and_lies_beside_its_weight(
    hf_config, targets, grid
):
    table = adapter_table(hf_config, LoraConfig(rank=3, targets=targets))
    written = defaultdict(list)
    for shard in ranks(*grid):
        weights = parameter_layout(hf_config, shard)
        for name, entry in layout_from_table(table, shard).items():
            axis = shard.etp if entry.is_expert else shard.tp
            # One of the ranks that differ only in the other kind of tensor rank.
            first = (shard.tp if entry.is_expert else shard.etp)[0] == 0 and (
                entry.is_expert or shard.ep[0] == 0
            )
            for piece in entry.pieces:
                if entry.is_owner and first:
                    written[piece.hf_name] += range(piece.hf_start, piece.hf_start + piece.length)
            base = weights[re.sub(r"\.lora\.[ab]$", ".weight", name)]
            assert entry.is_replicated or base.pieces[0].dim == ("b", "a").index(name[-1]), name
            side = 1 if name.endswith("a") else 0
            assert entry.shape[side] == base.shape[side] or entry.is_replicated
            if not entry.is_replicated:
                cut = {(p.hf_name.rpartition(".lora_")[0], p.hf_start) for p in entry.pieces}
                whole = {(p.hf_name.removesuffix(".weight"), p.hf_start) for p in base.pieces}
                assert cut <= whole, (name, axis)
    shapes = adapter_shapes(table)
    assert written.keys() == shapes.keys()
    for name, rows in written.items():
        assert sorted(rows) in ([*range(shapes[name][0])], [*range(shapes[name][1])]), name


def test_the_layers_with_an_adapter_are_the_linear_ones_that_were_chosen():
    shapes = adapter_shapes(adapter_table(DEEPSEEK, LoraConfig(rank=3)))
    linear = {
        name: shape
        for name, (shape, _) in hf_tensors(DEEPSEEK, with_mtp=False).items()
        if len(shape) == 2 and not re.search(r"embed_tokens|lm_head|mlp\.gate\.", name)
    }
    expected = {}
    for name, (height, width) in linear.items():
        expected[name.replace(".weight", ".lora_A.weight")] = (3, width)
        expected[name.replace(".weight", ".lora_B.weight")] = (height, 3)
    assert shapes == expected
    some = LoraConfig(targets=["experts.up_proj", "mlp.gate_proj", "o_proj"])
    of_some = adapter_table(DEEPSEEK, some)
    chosen = {name.rpartition(".lora_")[0] for name in adapter_shapes(of_some)}
    assert chosen == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.self_attn.o_proj",
        *(f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in range(4)),
    }
    matching = target_modules(of_some)
    modules = {name.removesuffix(".weight") for name in linear}
    assert {name for name in modules if re.fullmatch(matching, name)} == chosen


@pytest.mark.parametrize(
    ("target", "near"),
    [("q_porj", "q_proj"), ("lm_head", ""), ("experts.up_proj", ""), ("proj", "")],
)
def test_an_unknown_target_is_refused_with_those_there_are(target, near):
    with refused("model.lora.targets", Cause.UNKNOWN, target, near, "mlp.down_proj"):
        adapter_table(QWEN, LoraConfig(targets=["q_proj", target]))


def test_a_pipeline_rank_without_adapters_is_refused():
    config = Config.model_validate(
        {
            "model": {"lora": {"targets": ["experts.up_proj"]}, "mtp": "none"},
            "parallel": {"pipeline": 2, "processes": 2},
        }
    )
    with refused("model.lora.targets", Cause.EMPTY, "rank 0"):
        check_adapters(config, DEEPSEEK)  # layer 0 is dense
    every = config.model_copy(
        update={"model": config.model.model_copy(update={"lora": LoraConfig()})}
    )
    check_adapters(every, DEEPSEEK)


def test_a_tensor_rank_without_a_row_of_the_targets_is_refused():
    table = adapter_table(QWEN, LoraConfig(targets=["q_proj"]))
    layout_from_table(table, Shard(layers=(0,), tp=(1, 2)))
    with refused("model.lora.targets", Cause.EMPTY, "rank 1", "parallel.tensor=4", "k_proj"):
        layout_from_table(table, Shard(layers=(0,), tp=(1, 4)))  # a group's key and value
