"""Rows of preferences: what is read, and what is said of bad ones."""

import json

import pytest

from megatron_r1.data.preferences import Preference, read_preferences


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_pairs_come_with_the_chosen_response_first(tmp_path):
    path = write(
        tmp_path,
        {"question": "q", "rejected": "b", "chosen": "a", "votes": 4},
        {"prompt": "p", "chosen": "c", "rejected": "d", "opened": True},
    )
    assert list(read_preferences(path, "pairwise")) == [
        Preference("q", ("a", "b"), (1.0, 0.0), False, f"{path}:1"),
        Preference("p", ("c", "d"), (1.0, 0.0), True, f"{path}:2"),
    ]


@pytest.mark.parametrize(("label", "expected"), [(1, 1.0), (0, 0.0), (True, 1.0), (False, 0.0)])
def test_a_label_is_a_number_or_a_truth_value(tmp_path, label, expected):
    path = write(tmp_path, {"prompt": "q", "response": "a", "label": label})
    (row,) = read_preferences(path, "pointwise")
    assert row.labels == (expected,) and row.responses == ("a",)
