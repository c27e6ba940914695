from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent
pytestmark = pytest.mark.more


def test_an_offloaded_optimizer_trains_and_resumes_as_one_that_is_not(oracle, tmp_path):
    grids = ("dp2", "ep2")
    arguments = [str(oracle / "qwen3-moe"), str(tmp_path), *grids]
    output = run_ranks(HERE, 2, "optimizer_offload.py", *arguments)
    assert [f"{grid} holds" in output for grid in grids] == [True] * len(grids), output[-3000:]
