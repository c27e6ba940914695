"""A program's output and a function's result next to the expected one."""

from pathlib import Path

import pytest
from r1_grading.code.outputs import same_output, same_result

from megatron_r1.base.files.json_lines import read_lines

CASES = list(read_lines(Path(__file__).with_name("comparisons.jsonl")))


@pytest.mark.parametrize("kind", ["output", "result"])
def test_outputs_are_compared_token_by_token_and_results_as_values(kind):
    compare = {"output": same_output, "result": same_result}[kind]
    cases = [case for case in CASES if case["kind"] == kind]
    wrong = [
        case
        for case in cases
        if compare(case["actual"].encode(), case["expected"], case.get("tolerance"))
        is not case["equal"]
    ]
    assert cases and wrong == []


@pytest.mark.parametrize(
    ("actual", "expected", "equal"),
    [
        ("9" * 10**6, "1", False),
        ("1" + "0" * 999 + ".0", "1" + "0" * 999, True),
        ("1" + "0" * 998 + "1", "1" + "0" * 999, False),
    ],
    ids=["digits", "equal", "another digit"],
)
def test_long_outputs(actual, expected, equal):
    assert same_output(actual.encode(), expected, 0) is equal


@pytest.mark.parametrize(
    ("actual", "expected", "equal"),
    [
        (b"[" * 10**6, [], False),
        (b"9" * 10**6, 1, False),
        (b"9" * 5_000, 10**5_000 - 1, True),
        (b"9" * 5_000, 10**5_000 - 2, False),
        (b"NaN", float("nan"), False),
    ],
    ids=["brackets", "digits", "5,000 digits", "another digit", "NaN"],
)
def test_long_results(actual, expected, equal):
    assert same_result(actual, expected, None) is equal
