"""B52, B53, B55 to B57: which answers count, and which programs' results are equal."""

from pathlib import Path

import pytest
from r1_grading import math
from r1_grading.code.outputs import same_output, same_result
from r1_grading.code.problem import parse_problem

from megatron_r1.base.files.json_lines import read_lines

ROWS = list(read_lines(Path(__file__).with_name("answers.jsonl")))


@pytest.mark.parametrize("report", ["B52", "B53", "B55", "B56"])
def test_an_answer_is_worth_what_its_report_says(report):
    """A row without `readings` holds in all readings of a last line."""
    wrong = []
    for row in (row for row in ROWS if row["id"] == report):
        for reading in row.get("readings", ("strict", "auto", "last")):
            grade = math.grade(row["response"], row["truth"], reading=reading)
            if grade.reward != row["reward"]:
                wrong.append(f"{reading}: {row['response']!r} for {row['truth']}: {grade.reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (f"#### 42\n{'It is so. ' * 5_000}", 1),
        ("The answer is unclear. #### \n" * 2_000, 0),
        ("The answer is 42.\n" + "recheck so " * 5_000, 1),
        ("The answer is 42.\n" + "so we get " * 5_000, 1),
        ("**Answer: " * 5_000, 0),
    ],
    ids=["prose", "marks", "rechecks", "conclusions", "emphasis"],
)
def test_the_mark_is_found_in_a_long_response(response, reward):
    """In linear time: these are 50,000 characters, and a quadratic search would not end."""
    assert math.grade(response, "42", reading="auto").reward == reward


OUTPUTS = list(read_lines(Path(__file__).with_name("outputs.jsonl")))


@pytest.mark.parametrize(
    ("actual", "expected", "equal"),
    [(row["actual"], row["expected"], row["equal"]) for row in OUTPUTS],
)
def test_floats_of_a_program_are_compared_with_a_margin_and_integers_are_not(
    actual, expected, equal
):
    for is_livecodebench in (False, True):
        problem = {"input": "", "output": expected} if is_livecodebench else {"stdout": expected}
        parsed = parse_problem({"tests": [problem]}, "python")
        by_value = parsed.is_livecodebench
        assert by_value == is_livecodebench
        found = same_output(actual.encode(), expected, parsed.tolerance, by_value=by_value)
        assert found is equal
    exact = parse_problem({"tests": [problem], "tolerance": 0}, "python").tolerance
    assert same_output(actual.encode(), expected, exact) is (actual == expected.removesuffix(".0"))


@pytest.mark.parametrize(
    ("actual", "expected", "equal"),
    [
        (f"[{0.1 + 0.2}]", [0.3], True),
        ('{"mean": 1.6666667, "n": 3}', {"mean": 5 / 3, "n": 3}, True),
        ("[1.5, 1000001]", [1.5, 1000000], False),
        ("[0.301]", [0.3], False),
        ("2.0000001", 2, False),
        ('"0.30000000000000004"', "0.3", False),
    ],
)
def test_floats_of_a_function_likewise(actual, expected, equal):
    assert same_result(actual.encode(), expected, None) is equal
