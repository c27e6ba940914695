from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [(1, ["one"]), pytest.param(2, ["tp2", "pp2", "dp2"], marks=pytest.mark.more)],
)
def test_the_head_s_gradient_is_added_in_fp32_and_nothing_else_changes(oracle, world_size, grids):
    output = run_ranks(HERE, world_size, "head_gradients.py", str(oracle), *grids)
    assert [f"{grid} holds" in output for grid in grids] == [True] * len(grids), output[-3000:]
