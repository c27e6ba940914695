"""PPO's critic equals a naive fp64 loop over transformers' model on every layout."""

from pathlib import Path

import pytest
from ranks import run_ranks, run_script

HERE = Path(__file__).parent


@pytest.mark.more
@pytest.mark.parametrize(
    ("world_size", "name", "grids"),
    [
        pytest.param(1, "qwen-tied", ["one"], marks=pytest.mark.slow),
        (2, "qwen-tied", ["tp2", "pp2", "cp2", "dp2"]),
        pytest.param(2, "deepseek-plain-noqlora", ["tp2", "ep2"], marks=pytest.mark.slow),
        pytest.param(4, "deepseek-plain-noqlora", ["tp2xpp2", "cp2xdp2"], marks=pytest.mark.slow),
        pytest.param(4, "qwen-tied", ["pp2xvp2xtp2"], marks=pytest.mark.slow),
    ],
)
def test_values_updates_and_checkpoints(scored, oracle, tmp_path, world_size, name, grids):
    if not (scored / name / "critic.pt").exists():
        run_script(HERE, ["critic_oracle.py", str(scored), name])
    arguments = [str(oracle), str(scored), str(tmp_path), name, *grids]
    output = run_ranks(HERE, world_size, "critic_steps.py", *arguments)
    for grid in grids:
        assert f"{name} {grid} weights" in output, output[-3000:]
        assert f"{name} {grid} continues bit for bit" in output, output[-3000:]
