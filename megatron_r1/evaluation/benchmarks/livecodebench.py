"""LiveCodeBench code generation (Jain et al., arXiv 2403.07974), in the layout of
livecodebench/code_generation_lite.

Problems have the date of their contest: `from` and `to` select those after the end of a model's
training data. DeepSeek-R1 reports 2024-08 to 2025-01. `packed_tests` reads their tests."""

import json
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

from r1_grading.base.values import load_json

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.rows import require_text
from megatron_r1.evaluation.benchmarks.base import (
    Benchmark,
    Options,
    Question,
    Rows,
    code_limits,
    pick_columns,
)
from megatron_r1.evaluation.benchmarks.packed_tests import FILE_REMEDY, decode_tests

ROW_KEYS = (
    "question_id",
    "question_content",
    "contest_date",
    "difficulty",
    "starter_code",
    "public_test_cases",
    "private_test_cases",
    "metadata",
)
COLUMN_NAMES = {name: name for name in ROW_KEYS}
RELEASES = ("v1", "v2", "v3", "v4", "v5", "v6")
"""Each adds a file to the previous one: test.jsonl, test2.jsonl, …"""
CPU_SECONDS, MEMORY_MIB = 6.0, 4_096
"""Per test, as in LiveCodeBench's own runner."""
STDIN_INSTRUCTION = (
    "Write a Python program that solves the problem: it reads the input from standard input and "
    "writes the answer to standard output. Give the whole program in one ```python block."
)
FUNCTION_INSTRUCTION = (
    "Complete the starter code with a solution of the problem. Give the whole code, with the class "
    "and the method as they are named here, in one ```python block.\n\n```python\n{}\n```"
)


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the problems of contests within the dates, of the difficulty asked for."""
    first = _parse_day("from", options["from"] or date.min)
    last = _parse_day("to", options["to"] or date.max)
    for location, row in rows:
        columns = pick_columns(location, row, [COLUMN_NAMES])
        day = _parse_day(f"{location}: contest_date", columns["contest_date"])
        if first <= day <= last and options["difficulty"] in (None, columns["difficulty"]):
            yield _problem_question(location, columns)


def files(options: Options) -> list[str]:
    """Return the files of a release.

    Raises:
        UserError: an unknown release.
    """
    release = str(options["release"]).removeprefix("release_")
    if release not in RELEASES:
        raise UserError(
            f"livecodebench has no release {release!r}; use {', '.join(RELEASES)}",
            key="options.release",
            cause=Cause.UNKNOWN,
        )
    names = [f"test{number}.jsonl" for number in range(2, len(RELEASES) + 1)]
    return ["test.jsonl", *names][: RELEASES.index(release) + 1]


def _problem_question(location: str, row: dict[str, Any]) -> Question:
    tests = decode_tests(row["public_test_cases"], location)
    tests += decode_tests(row["private_test_cases"], location)
    if not tests:
        raise UserError(
            f"{location}: public_test_cases and private_test_cases are both empty; remove the row",
            key="private_test_cases",
            cause=Cause.EMPTY,
        )
    text = require_text(location, row, "question_content").strip()
    kinds = {test.get("testtype") for test in tests}
    if kinds == {"functional"}:
        text += "\n\n" + FUNCTION_INSTRUCTION.format(row["starter_code"].rstrip())
        truth = _function_tests(location, row, tests)
    elif kinds == {"stdin"}:
        text += "\n\n" + STDIN_INSTRUCTION
        truth = {"tests": [{"input": t["input"], "output": t["output"]} for t in tests]}
    else:
        raise UserError(
            f"{location}: 'testtype' must be stdin or functional in all tests of a row, got "
            f"{', '.join(sorted(map(repr, kinds)))}; {FILE_REMEDY}",
            key="testtype",
            cause=Cause.MALFORMED,
        )
    limits = code_limits(CPU_SECONDS, MEMORY_MIB, len(tests))
    fields = {"language": "python", "limits": limits}
    return Question(str(row["question_id"]), text, "code", truth, fields)


def _function_tests(
    location: str, row: dict[str, Any], tests: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return tests of a function: one JSON value per argument, one per line; the result is JSON."""
    try:
        name = json.loads(row["metadata"])["func_name"]
        cases = [
            {
                "args": [load_json(line) for line in test["input"].split("\n") if line.strip()],
                "result": load_json(test["output"]),
            }
            for test in tests
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{location}: a functional test needs 'input' and 'output' as JSON text, and "
            f"'func_name' in the row's metadata: {error!r}; {FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    return {"function": name, "tests": cases}


def _parse_day(name: str, value: Any) -> date:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    try:
        return datetime.fromisoformat(str(value)).date()
    except ValueError:
        raise UserError(
            f"{name} must be a date such as 2024-08-01, got {value!r}",
            key=name.rpartition(": ")[2],
            cause=Cause.MALFORMED,
        ) from None


BENCHMARK = Benchmark(
    questions,
    hubs={"livecodebench/code_generation_lite": files},
    options={"release": "v6", "from": None, "to": None, "difficulty": None},
)
