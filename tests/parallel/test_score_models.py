"""Score models equal transformers' at every layout; HF → Megatron → HF is bit-identical."""

from pathlib import Path

import pytest
from ranks import run_ranks
from scored_models import models_on

pytestmark = pytest.mark.more

HERE = Path(__file__).parent
TWO_RANKS = ["tp2", "pp2", "cp2", "dp2", "ep2", "pp2xvp2"]
FOUR_RANKS = ["tp2xpp2", "tp2xcp2", "tp2xdp2", "cp2xdp2", "tp2xetp2", "pp2xcp2"]


@pytest.mark.parametrize(
    ("world_size", "grids"),
    [
        pytest.param(1, ["one"], id="1"),
        pytest.param(2, TWO_RANKS, id="2", marks=pytest.mark.slow),
        pytest.param(4, FOUR_RANKS, id="4", marks=pytest.mark.slow),
    ],
)
def test_scores_losses_gradients_and_checkpoints_equal_transformers(
    scored, oracle, tmp_path, world_size, grids
):
    arguments = [str(scored), str(oracle), str(tmp_path), *grids]
    output = run_ranks(HERE, world_size, "score_steps.py", *arguments)
    for grid in grids:
        lines = [line for line in output.splitlines() if f" {grid} " in line]
        num_models = len(models_on(grid, world_size))
        checks = (" scores: ", "round trip", "pairwise loss", "pointwise loss", "starts from a")
        for what in checks:
            assert sum(what in line for line in lines) == num_models, (what, output[-3000:])
        assert sum("gradients" in line for line in lines) == 2 * num_models, output[-3000:]
