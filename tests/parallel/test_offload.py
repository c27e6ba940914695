from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent


def holds(grids, oracle, folder: Path, model: str = "qwen3-moe") -> None:
    output = run_ranks(HERE, 2, "offload_steps.py", str(oracle / model), str(folder), *grids)
    assert [f"{grid} holds" in output for grid in grids] == [True] * len(grids), output[-3000:]


@pytest.mark.more
def test_state_that_is_away_between_phases_trains_as_state_that_stays(oracle, tmp_path):
    holds(["dp2:bfloat16:whole"], oracle, tmp_path)


@pytest.mark.slow  # the one above is in make test
def test_it_does_in_fp32_over_experts_stages_and_with_adapters(oracle, tmp_path):
    grids = ["dp2:float32:whole", "ep2:bfloat16:whole", "pp2:float32:whole", "dp2:float32:lora"]
    holds(grids, oracle, tmp_path)
