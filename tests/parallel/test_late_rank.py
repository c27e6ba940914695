"""A collective operation that another rank does not come to in time."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

HERE = Path(__file__).parent


@pytest.mark.more
def test_a_late_rank_is_named_with_operation_place_and_key(tmp_path):
    run_ranks(HERE, 2, "late_rank.py", str(tmp_path / "out.json"))
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["limits"] == [12_345.0] * 4, "world, Megatron's, the replica's"
    sentence, of_another_limit = out["sentences"]
    for shown in (
        *("trainer rank 0", "'export'", "parallel.timeout_seconds: 0.5"),
        *("broadcast_object_list among ranks 0, 1", "run_on_rank_zero (export.py:"),
    ):
        assert shown in sentence, sentence
    assert of_another_limit == "", "a push has a limit of its own"
