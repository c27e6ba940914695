from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent


@pytest.mark.slow
def test_recomputing_changes_nothing_and_the_router_s_bias_is_the_same_everywhere(oracle, tmp_path):
    model = str(oracle / "deepseek-yarn-mtp")
    for world_size, grids in ((1, ["one"]), (2, ["tp2", "cp2", "ep2", "pp2xvp2"])):
        output = run_ranks(HERE, world_size, "trainer_options.py", model, str(tmp_path), *grids)
        assert [f"{grid} holds" in output for grid in grids] == [True] * len(grids), output[-3000:]
