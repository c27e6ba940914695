"""A program's output beside the expected one."""

import pytest

from megatron_r1.rewards.code.compare import equal_output, equal_result


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "same"),
    [
        (b"1\n2\n", "1\n2", None, True),
        (b"1\n", "1\n2", None, False),
        (b"1\n2\n3", "1\n2", None, False),
        (b"1  2", "1 2", None, True),
        (b"1 2 3", "1 2", 0.0, False),
        (b"1.0", "1", None, False),
        (b"1.0", "1", 0.0, True),
        (b"1.001", "1", 0.001, True),
        (b"1.0011", "1", 0.001, False),
        (b"2002", "2000", 0.001, True),  # relative to the expected one
        (b"9007199254740993", "9007199254740992", 0.0, False),
    ],
)
def test_lines_and_tokens(actual, expected, tolerance, same):
    assert equal_output(actual, expected, tolerance) is same


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "same"),
    [
        (b"[1, 2]", [1, 2], None, True),
        (b"[1]", [1, 2], None, False),
        (b'{"a": 1}', {"a": 1.5}, 0.5, True),
        (b'{"a": 1}', {"b": 1}, 0.5, False),
        (b"NaN", float("nan"), 1.0, False),
        (b"not JSON", "not JSON", None, False),
    ],
)
def test_json_values(actual, expected, tolerance, same):
    assert equal_result(actual, expected, tolerance) is same
