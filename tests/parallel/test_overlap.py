from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent


@pytest.mark.slow
def test_parameters_gathered_in_the_background_are_the_same(oracle):
    output = run_ranks(HERE, 2, "overlap_steps.py", str(oracle / "deepseek-yarn-mtp"))
    assert output.count("holds") == 2
