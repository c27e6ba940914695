"""The shapes that pipeline stages expect, against those that Megatron has them exchange."""

from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        (2, ["pp2", "pp2xvp2"]),
        pytest.param(4, ["pp4xapart", "pp4xuneven", "pp2xvp2xcp2"], marks=pytest.mark.more),
        pytest.param(4, ["pp2xvp2xtp2", "pp2xep2"], marks=pytest.mark.slow),
    ],
)
def test_every_stage_expects_what_is_sent(oracle, world_size, grids):
    run_ranks(HERE, world_size, "hop_shapes.py", str(oracle / "deepseek-yarn-mtp"), *grids)
