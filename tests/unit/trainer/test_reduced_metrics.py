"""Metrics of several ranks: sums are added, of maxima the largest is taken."""

import math
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_r1.trainer import metrics
from megatron_r1.trainer.metrics import Maximum, Mean, reduce_over_data


@pytest.fixture
def grid_position(monkeypatch):
    """A rank of two, of which the other has means of 6 over 3 and a maximum of 4."""
    theirs = iter([[[6.0], [3.0]], [4.0]])

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        assert group == "data and context"
        other = tensor.new_tensor(next(theirs))
        both = tensor.maximum(other) if op == dist.ReduceOp.MAX else tensor + other
        tensor.copy_(both)

    monkeypatch.setattr(metrics.dist, "all_reduce", all_reduce)
    return SimpleNamespace(is_last_stage=True, groups=SimpleNamespace(dp_cp="data and context"))


@pytest.mark.parametrize(("mine", "largest"), [(1.0, 4.0), (5.0, 5.0), (math.nan, math.inf)])
def test_means_are_over_all_things_and_maxima_over_all_ranks(grid_position, mine, largest):
    found = reduce_over_data(grid_position, {"kl": Mean(3.0, 1), "ratio/max": Maximum(mine)})
    assert found == {"kl": 9 / 4, "ratio/max": largest}


def test_other_stages_have_none(grid_position):
    grid_position.is_last_stage = False
    assert reduce_over_data(grid_position, {"kl": Mean(3.0, 1)}) == {}
