"""Rows of preferences: what is read, and what is said of bad ones."""

import json

import pytest

from megatron_r1.data.preferences import Preference, kind_of_rows, read_preferences


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_pairs_come_with_the_chosen_response_first(tmp_path):
    path = write(
        tmp_path,
        {"question": "q", "rejected": "b", "chosen": "a", "votes": 4},
        {"prompt": "p", "chosen": "c", "rejected": "d", "thought_opened": True},
    )
    assert list(read_preferences(path, "pairwise")) == [
        Preference("q", ("a", "b"), (1.0, 0.0), False, f"{path}:1"),
        Preference("p", ("c", "d"), (1.0, 0.0), True, f"{path}:2"),
    ]


USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("pairwise", {"prompt": [USER], "chosen": [HELLO], "rejected": "No"}),
        ("pairwise", {"instruction": "Hi", "chosen": "Hello", "rejected": "No"}),
        (
            "pairwise",
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
        ),
        ("pointwise", {"prompt": [USER], "completion": [HELLO], "label": True}),
        ("pointwise", {"instruction": "Hi", "response": "Hello", "label": 1}),
    ],
)
def test_pairs_and_labels_as_other_libraries_write_them(tmp_path, kind, row):
    [read] = read_preferences(write(tmp_path, row), kind)
    assert (read.question, read.responses[0], read.labels[0]) == ("Hi", "Hello", 1.0)
    assert kind_of_rows([row]) == kind


@pytest.mark.parametrize(("label", "expected"), [(1, 1.0), (0, 0.0), (True, 1.0), (False, 0.0)])
def test_a_label_is_a_number_or_a_truth_value(tmp_path, label, expected):
    path = write(tmp_path, {"prompt": "q", "response": "a", "label": label})
    (row,) = read_preferences(path, "pointwise")
    assert row.labels == (expected,) and row.responses == ("a",)
