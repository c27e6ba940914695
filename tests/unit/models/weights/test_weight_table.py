import math
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest
from refusals import refused
from weight_shards import shard

from megatron_r1.base.errors import Cause
from megatron_r1.models import weights
from megatron_r1.models.weights.splits import (
    QueryGroups,
    Source,
    column_parallel,
    replicated,
    row_parallel,
    vocab_parallel,
)

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
}
QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# Small enough to enumerate, different sizes for rows and columns, a vocabulary no size divides.
SMALL_DEEPSEEK = {
    **DEEPSEEK_V3,
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
SMALL_QWEN = {
    **QWEN_1_5B,
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SMALL_LLAMA = {
    **SMALL_QWEN,
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 5,
    "tie_word_embeddings": False,
}


def pieces_of(split, sources, rank, ranks):
    shape, pieces = split(tuple(Source(*source) for source in sources), rank, ranks)
    return shape, [(p.hf_name, p.dim, p.hf_start, p.local_start, p.length) for p in pieces]


def test_columns_puts_this_ranks_gate_before_its_up():
    shape, pieces = pieces_of(column_parallel, [("gate", (6, 3)), ("up", (6, 3))], 1, 2)
    assert shape == (6, 3)
    assert pieces == [("gate", 0, 3, 0, 3), ("up", 0, 3, 3, 3)]


def test_rows_cuts_columns():
    assert pieces_of(row_parallel, [("down", (5, 8))], 3, 4) == ((5, 2), [("down", 1, 6, 0, 2)])


def test_whole_is_the_same_everywhere():
    assert pieces_of(replicated, [("norm", (5,))], 3, 4) == ((5,), [("norm", 0, 0, 0, 5)])


def test_vocabulary_pads_the_last_ranks():
    held = [pieces_of(vocab_parallel, [("embed", (5, 2))], rank, 4) for rank in range(4)]
    assert [shape for shape, _ in held] == [(2, 2)] * 4
    assert [pieces for _, pieces in held] == [
        [("embed", 0, 0, 0, 2)],
        [("embed", 0, 2, 0, 2)],
        [("embed", 0, 4, 0, 1)],
        [],
    ]


def test_query_groups_interleaves_queries_keys_and_values():
    # Two groups of two query heads, head size 3: Megatron stores q q k v | q q k v.
    sources = [("q", (12, 7)), ("k", (6, 7)), ("v", (6, 7))]
    assert pieces_of(QueryGroups(2), sources, 0, 1) == (
        (24, 7),
        [
            ("q", 0, 0, 0, 6),
            ("k", 0, 0, 6, 3),
            ("v", 0, 0, 9, 3),
            ("q", 0, 6, 12, 6),
            ("k", 0, 3, 18, 3),
            ("v", 0, 3, 21, 3),
        ],
    )
    assert pieces_of(QueryGroups(2), sources, 1, 2) == (
        (12, 7),
        [("q", 0, 6, 0, 6), ("k", 0, 3, 6, 3), ("v", 0, 3, 9, 3)],
    )


def test_more_ranks_than_query_groups_hold_equal_runs_of_rows():
    # The 24 rows q q k v | q q k v, of 3 rows each, as four runs of 6.
    sources = [("q", (12, 7)), ("k", (6, 7)), ("v", (6, 7))]
    held = [pieces_of(QueryGroups(2), sources, rank, 4) for rank in range(4)]
    assert [shape for shape, _ in held] == [(6, 7)] * 4
    assert [pieces for _, pieces in held] == [
        [("q", 0, 0, 0, 6)],
        [("k", 0, 0, 0, 3), ("v", 0, 0, 3, 3)],
        [("q", 0, 6, 0, 6)],
        [("k", 0, 3, 0, 3), ("v", 0, 3, 3, 3)],
    ]
    # One group, runs that end amid a head.
    sources = [("q", (10, 7)), ("k", (5, 7)), ("v", (5, 7))]
    assert pieces_of(QueryGroups(1), sources, 2, 4) == ((5, 7), [("k", 0, 0, 0, 5)])
    assert pieces_of(QueryGroups(1), sources, 1, 2)[1] == [("k", 0, 0, 0, 5), ("v", 0, 0, 5, 5)]


def test_a_split_that_does_not_divide_is_named():
    sources = [("q", (4, 1)), ("k", (2, 1)), ("v", (2, 1))]
    with refused("parallel.tensor", Cause.INDIVISIBLE, "num_key_value_heads=2", 3):
        pieces_of(QueryGroups(2), sources, 0, 3)
    with refused("parallel.tensor", Cause.INDIVISIBLE, 16, 8):
        pieces_of(QueryGroups(2), sources, 0, 16)
    with refused("parallel.tensor", Cause.INDIVISIBLE, "gate", 4):
        pieces_of(column_parallel, [("gate", (6, 3))], 0, 4)


@pytest.mark.parametrize(
    "hf_config, total",
    [
        ({**DEEPSEEK_V3, "num_nextn_predict_layers": 0}, 671_026_419_200),
        (QWEN_1_5B, 1_543_714_304),
        (LLAMA_8B, 8_030_261_248),
    ],
)
def test_the_tables_add_up_to_the_published_sizes(hf_config, total):
    tensors = weights.hf_tensors(hf_config)
    assert sum(math.prod(shape) for shape, _ in tensors.values()) == total


def test_deepseek_v3_adds_up_to_its_release_with_mtp_and_fp8_scales():
    # huggingface.co/deepseek-ai/DeepSeek-V3: 684,531,386,000 elements, one scale per 128 x 128
    # block of every projection in a layer but eh_proj among them.
    tensors = {name: shape for name, (shape, _) in weights.hf_tensors(DEEPSEEK_V3).items()}
    quantized = [s for n, s in tensors.items() if "_proj" in n and "eh_proj" not in n]
    num_scales = sum(math.prod(-(-size // 128) for size in shape) for shape in quantized)
    assert sum(map(math.prod, tensors.values())) + num_scales == 684_531_386_000


def test_tensors_have_the_checkpoints_names_and_keep_their_own_dtype():
    tensors = weights.hf_tensors(DEEPSEEK_V3)
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight"] == ((7168, 2048), "bfloat16")
    assert tensors["model.layers.3.mlp.gate.e_score_correction_bias"] == ((256,), "float32")
    assert tensors["model.layers.61.shared_head.head.weight"] == ((129280, 7168), "bfloat16")
    assert "model.layers.2.mlp.gate_proj.weight" in tensors
    assert "model.layers.2.mlp.gate.weight" not in tensors
    without = weights.hf_tensors(DEEPSEEK_V3, with_mtp=False)
    assert not [name for name in without if name.startswith("model.layers.61.")]
    assert "lm_head.weight" not in weights.hf_tensors(QWEN_1_5B)


def grids(hf_config):
    expert_sizes = (1, 2, 4) if "n_routed_experts" in hf_config else (1,)
    return product((1, 2, 4), (1, 2, 4), expert_sizes, (1, 2) if len(expert_sizes) > 1 else (1,))


@pytest.mark.first_cases(2)
@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize(
    "hf_config",
    [SMALL_DEEPSEEK, SMALL_QWEN, SMALL_LLAMA],
    ids=lambda hf_config: hf_config["architectures"][0],
)
def test_owners_hold_every_element_exactly_once_on_every_grid(hf_config, transformer_engine):
    expected = weights.hf_tensors(hf_config)
    copies = {n for n in expected if n.endswith((".embed_tokens.weight", ".head.weight"))}
    copies -= {"model.embed_tokens.weight"}
    for tp, pp, ep, etp in grids(hf_config):
        covered = Counter()
        for t, p, e, x in product(range(tp), range(pp), range(ep), range(etp)):
            at = shard(
                hf_config,
                tp=(t, tp),
                pp=(p, pp),
                ep=(e, ep),
                etp=(x, etp),
                transformer_engine=transformer_engine,
            )
            for entry in weights.parameter_layout(hf_config, at).values():
                # The other axes' replicas hold the same: count each kind once along its own axes.
                replica = (t > 0) if entry.is_expert else (e > 0 or x > 0)
                if entry.is_owner and not replica:
                    for piece in entry.pieces:
                        full = expected[piece.hf_name][0]
                        assert piece.hf_start + piece.length <= full[piece.dim]
                        assert piece.local_start + piece.length <= entry.shape[piece.dim]
                        runs = range(piece.hf_start, piece.hf_start + piece.length)
                        covered.update((piece.hf_name, piece.dim, i) for i in runs)
        assert set(covered.values()) == {1}, f"written twice at tp{tp} pp{pp} ep{ep} etp{etp}"
        lengths = Counter((name, dim) for name, dim, _ in covered)
        assert {name for name, _ in lengths} == expected.keys() - copies
        for (name, dim), length in lengths.items():
            assert length == expected[name][0][dim], f"{name} at tp{tp} pp{pp} ep{ep} etp{etp}"


def test_transformer_engines_names_replace_megatrons():
    at = shard(SMALL_DEEPSEEK, ep=(1, 2), transformer_engine=True)
    names = weights.parameter_layout(SMALL_DEEPSEEK, at)
    assert names["decoder.layers.1.mlp.experts.linear_fc2.weight3"].pieces[0].hf_name == (
        "model.layers.1.mlp.experts.7.down_proj.weight"
    )
    for name in (
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight",
        "mtp.layers.0.mtp_model_layer.self_attention.linear_q_up_proj.layer_norm_weight",
    ):
        assert name in names
    dense = weights.parameter_layout(SMALL_QWEN, shard(SMALL_QWEN, transformer_engine=True))
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in dense


def test_layouts_need_neither_torch_nor_megatron():
    code = (
        "import sys; from megatron_r1 import models; from megatron_r1.models import weights; "
        "models.read_hf_config; "
        "bad = {'torch', 'megatron'} & sys.modules.keys(); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
