"""Updates where a prompt is computed once equal those where each response has its own."""

from pathlib import Path

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.more

HERE = Path(__file__).parent
NAMES = ["qwen-untied", "deepseek-yarn-mtp"]


@pytest.mark.parametrize(
    ("world_size", "grid"),
    [(1, "one"), *(pytest.param(2, g, marks=pytest.mark.slow) for g in ("tp2", "pp2", "dp2"))],
)
def test_metrics_and_weights_are_the_same(oracle, world_size, grid):
    output = run_ranks(HERE, world_size, "shared_steps.py", str(oracle), grid, *NAMES)
    assert all(f"{name} {grid}: " in output for name in NAMES), output[-3000:]
