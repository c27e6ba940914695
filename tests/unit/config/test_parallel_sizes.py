"""Which parallel sizes go with a number of ranks."""

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import ParallelConfig


@pytest.mark.parametrize(
    ("sizes", "ranks", "other"),
    [
        ({"tensor": 2, "context": 2}, 8, 6),
        ({"pipeline": 3}, 6, 4),
        ({"expert": 4}, 8, 6),
        ({"expert": 2, "expert_tensor": 2, "pipeline": 2}, 8, 4),
    ],
)
def test_ranks_are_a_multiple_of_both_groups(sizes, ranks, other):
    parallel = ParallelConfig(**sizes)
    parallel.check_sizes(ranks)
    with refused("parallel", Cause.INDIVISIBLE, other):
        parallel.check_sizes(other)
