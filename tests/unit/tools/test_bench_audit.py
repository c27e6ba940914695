"""`tools/bench audit`: its rates by labels, counted by hand, and its intervals around them."""

import argparse
import json

import pytest

from tools.bench import audit

ANSWERS = [
    {"truth": "1/2", "answer": "0.5", "reward": 1},
    {"truth": "13", "answer": "13", "reward": 1},
    {"truth": "13", "answer": "not 13", "reward": 0},
    {"truth": "13", "answer": "14", "reward": 0},
    {"truth": "x^2 - 1", "answer": "(x+1)(x-1)", "reward": 1},
]


@pytest.mark.more
def test_rates_by_labels_are_in_the_intervals_of_a_census(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ANSWERS)))
    result = audit.run(argparse.Namespace(files=[path], size=200, seeds=3, workers=1))
    rates = {
        (row["verifier"], row["error"]): (row["of"], row["rate_by_labels"])
        for row in result["rows"]
        if row["source"] == "pairs"
    }
    # Equal text accepts the second alone; the last number accepts the second, the third and, for
    # its exponent, none of the last.
    assert rates["same text", "wrongly rejected"] == (4, pytest.approx(2 / 4))
    assert rates["same text", "wrongly accepted"] == (1, 0.0)
    assert rates["last number", "wrongly accepted"][1] > 0
    assert rates["ours", "wrongly rejected"] == (2, 0.0)
    assert all(row["holds"] == 3 for row in result["rows"] if row["verifier"] != audit.BY_ITSELF)
    assert result["contradicted_labels"] == 0
