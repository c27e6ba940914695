"""Stages against Megatron's own classes, which decide what is really built."""

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.models import weights
from megatron_r1.models.pipeline_stages import parse_layout, pipeline_stages, uneven_layout

SMALL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_nextn_predict_layers": 1,
}

LAYOUTS = [
    ("E,t*3|(tt|)*29,mL", 31, 1, 61, 1),
    ("Et*3|(tt|)*29,m|L", 16, 2, 61, 1),
    ("Et|(tt|)*29|t,m,L", 32, 1, 60, 1),
    ("Et*3|(tttt|)*14ttmL", 16, 1, 61, 1),
    ("E|t|tt|ttt|L", 5, 1, 6, 0),
    ("Et|t|t|t|tt|t|t|L", 4, 2, 8, 0),
    ("Et||tL", 3, 1, 2, 0),
    ("EttL", 1, 1, 2, 0),
    (" Et , t*2 | t m L ", 2, 1, 4, 1),
    *(
        (uneven_layout(layers, ranks, virtual), ranks, virtual, layers, 0)
        for layers, ranks, virtual in ((61, 16, 1), (30, 4, 2), (5, 2, 2), (3, 2, 1))
    ),
    (uneven_layout(61, 16, num_mtp=1), 16, 1, 61, 1),
]


@pytest.mark.parametrize("layout, pipeline, virtual, num_layers, num_mtp", LAYOUTS)
def test_a_layout_means_what_it_means_to_megatron(layout, pipeline, virtual, num_layers, num_mtp):
    theirs = PipelineParallelLayerLayout(layout.replace(" ", ""), pipeline)
    theirs.validate_layer_layout(num_layers, num_mtp or None)
    ours = pipeline_stages(num_layers, pipeline, virtual, num_mtp=num_mtp, layout=layout)
    assert [len(chunks) for chunks in ours] == [virtual] * pipeline
    # Without process groups their offsets are known by counting in the order of the pipeline.
    start = 0
    for virtual_rank in range(virtual):
        for rank in range(pipeline):
            chunk, kinds = ours[rank][virtual_rank], theirs.layout[rank][virtual_rank]
            length = kinds.count(LayerType.decoder)
            assert chunk.layers == tuple(range(start, start + length)), (rank, virtual_rank)
            assert chunk.embedding == (LayerType.embedding in kinds)
            assert chunk.mtp == (LayerType.mtp in kinds)
            assert chunk.head == (LayerType.loss in kinds)
            # transformer_block.py, has_final_layernorm_in_this_stage
            assert chunk.final_norm == (num_layers - 1 in chunk.layers if num_mtp else chunk.head)
            start += length


@pytest.mark.parametrize(
    "layout, pipeline, virtual, num_layers, num_mtp, cause, shows",
    [
        ("Et|ttL", 2, 1, 4, 0, Cause.CONFLICT, ("(t)", 4, 3)),
        ("Et|ttmL", 2, 1, 3, 0, Cause.CONFLICT, ("(m)", 0, 1)),
        ("Et|tt|L", 2, 1, 3, 0, Cause.INDIVISIBLE, (3, "parallel.pipeline=2")),
        ("Et|t|t|L", 2, 4, 3, 0, Cause.CONFLICT, (2, "parallel.virtual_pipeline", 4)),
        ("tE|tL", 2, 1, 2, 0, Cause.MALFORMED, ()),
        ("Et|mtL", 2, 1, 2, 1, Cause.MALFORMED, ("(m)", "(t)")),
        ("Ett|m|L|", 2, 1, 2, 1, Cause.MALFORMED, ("(m)",)),
        ("Ex|tL", 2, 1, 1, 0, Cause.MALFORMED, ("x|tL",)),
        ("E(t(t|)*2)*2L", 2, 1, 1, 0, Cause.MALFORMED, ("(t(t|)*2)*2L",)),
    ],
)
def test_an_impossible_layout_is_refused_with_its_reason(
    layout, pipeline, virtual, num_layers, num_mtp, cause, shows
):
    with refused("parallel.pipeline_layout", cause, layout, *shows):
        pipeline_stages(num_layers, pipeline, virtual, num_mtp=num_mtp, layout=layout)


def test_more_stages_than_layers_are_refused():
    with refused("parallel.pipeline", Cause.TOO_LARGE, 64, 61):
        pipeline_stages(61, 16, 4, num_mtp=1)


def test_repetitions_unroll():
    assert parse_layout("Ettt|(tt|)*2,m|L") == ["Ettt", "tt", "tt", "m", "L"]
    assert parse_layout("E(|tt)*3|L") == ["E", "tt", "tt", "tt", "L"]


def test_virtual_stages_take_turns():
    # Megatron's interleaved schedule: 8 layers, 2 stages, 2 virtual stages.
    held = pipeline_stages(8, 2, 2)
    assert [[c.layers for c in chunks] for chunks in held] == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


@pytest.mark.parametrize(
    "layout, pipeline", [("E|tt|tt|mL", 2), ("Ettt|t|m|L", 4), ("Et|t|tt|mL", 2), ("Ettt|||tmL", 2)]
)
def test_uneven_stages_hold_every_parameter_once(layout, pipeline):
    shards = weights.stage_shards(SMALL, pipeline, pipeline_layout=layout)
    entries = [
        e for chunks in shards for c in chunks for e in weights.parameter_layout(SMALL, c).values()
    ]
    held = [piece.hf_name for entry in entries if entry.is_owner for piece in entry.pieces]
    assert len(held) == len(set(held))
    copies = {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}
    assert set(held) == weights.hf_tensors(SMALL).keys() - copies


def test_layers_that_do_not_divide_are_spread_with_the_ends_shorter():
    def lengths(*size, **mtp):
        return [len(chunk.layers) for chunks in pipeline_stages(*size, **mtp) for chunk in chunks]

    assert lengths(61, 16, num_mtp=1) == [3] + [4] * 13 + [3, 3]
    assert lengths(30, 4) == [7, 8, 8, 7]
    assert lengths(3, 2) == [2, 1], "the head costs more than the embedding"
    assert lengths(6, 3) == [2, 2, 2]
