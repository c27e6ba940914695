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


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairwise", {"question": "q", "chosen": "a"}, "'rejected' must be a string"),
        ("pairwise", {"chosen": "a", "rejected": "b"}, "'prompt' must be a string"),
        ("pairwise", {"question": "q", "chosen": "a", "rejected": "a"}, "the same text"),
        ("pointwise", {"question": "q", "response": "a"}, "'label' must be 1 or true.*is missing"),
        ("pointwise", {"question": "q", "response": "a", "label": "safe"}, "it is 'safe'"),
        ("pointwise", {"question": "q", "response": "a", "label": 0.5}, "it is 0.5"),
        ("pointwise", {"question": "q", "response": "a", "label": 1, "opened": 1}, "'opened'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, kind, row, message):
    good = {"question": "q", "chosen": "a", "rejected": "b", "response": "c", "label": 1}
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        list(read_preferences(write(tmp_path, good, row), kind))
