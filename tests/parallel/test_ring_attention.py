"""Attention under context parallelism: equal to the unsharded formula, within a rank's memory."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.more

HERE = Path(__file__).parent
# Of numbers of order 1, over sums of up to 240 terms.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.05}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_s_share_is_that_of_the_whole_batch_and_takes_memory_linear_in_tokens(
    tmp_path, ranks
):
    run_ranks(HERE, ranks, "ring_steps.py", str(tmp_path))
    for rank in range(ranks):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(report["differences"]) == 27
        for case, differences in report["differences"].items():
            tolerance = TOLERANCES[case.rpartition(".")[2]]
            assert max(differences.values()) < tolerance, (rank, case, differences)
        # Inputs of 2 MB; scores of two heads would take 1.2 GB on one rank, more on several.
        assert max(report["bytes"].values()) < 200e6, (rank, report["bytes"])
