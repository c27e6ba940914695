"""Parallel layouts in miniature."""

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import ParallelConfig
from megatron_r1.rehearse.layout import different_layout, num_layers, shrink_layout


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [
        ({}, 2),
        ({"pipeline": 2}, 4),
        ({"pipeline": 2, "virtual_pipeline": 2}, 8),
        ({"pipeline": 2, "pipeline_layout": "Ett|tL"}, 3),
    ],
)
def test_every_stage_of_a_miniature_has_layers(sizes, layers):
    assert num_layers(ParallelConfig(**sizes)) == layers


def test_replicas_are_dropped_only_where_experts_do_not_need_them():
    plain = ParallelConfig(processes=8, tensor=2, pipeline=2)
    assert shrink_layout(plain, 8).processes == 8
    assert shrink_layout(plain, 4).processes == 4
    spread = ParallelConfig(processes=8, tensor=1, expert=8)
    assert shrink_layout(spread, 2).processes == 2
    with refused("rehearsal.max_ranks", Cause.OUT_OF_RANGE, 2):
        shrink_layout(spread, 1)


@pytest.mark.parametrize(
    ("sizes", "axes", "ranks"),
    [
        ({"processes": 8, "tensor": 2, "context": 2, "pipeline": 2, "expert": 2}, {"tensor"}, 4),
        ({"processes": 4, "pipeline": 2}, set(), 2),
        ({"processes": 4, "tensor": 2, "pipeline": 2, "expert": 2}, {"tensor", "expert"}, 2),
        ({"processes": 2, "pipeline": 2}, set(), 4),
    ],
)
def test_the_resumed_layout_has_fewer_ranks_where_axes_can_be_left_out(sizes, axes, ranks):
    parallel = ParallelConfig(**sizes)
    other = different_layout(parallel)
    other.check_sizes(other.processes)
    changed = {axis for axis in sizes if getattr(other, axis) != getattr(parallel, axis)}
    assert changed - {"processes"} == axes and other.processes == ranks


def test_the_overlap_of_an_exchange_goes_with_the_axes_that_it_needs():
    parallel = ParallelConfig(expert=4, processes=4, overlap_expert_exchange=True)
    small = shrink_layout(parallel, 8)
    assert small.expert == 2 and small.overlap_expert_exchange
    resumed = different_layout(small)
    assert resumed.overlap_expert_exchange == (resumed.expert > 1)
    assert not shrink_layout(parallel, 1, leaves_out=True).overlap_expert_exchange
    deep = ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2, processes=4)
    deep = deep.model_copy(update={"overlap_expert_exchange": True})
    alone = shrink_layout(deep, 2, leaves_out=True)
    assert alone.pipeline == 2 or not alone.overlap_expert_exchange
