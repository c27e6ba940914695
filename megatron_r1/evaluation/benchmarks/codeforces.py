"""Codeforces problems in the layout of open-r1/codeforces, with their official tests and checkers.

Interactive problems, those that read files and those with incomplete tests are left out: a program
that passes incomplete tests may be wrong. The result is the share of solved problems, not a rating.
"""

import math
from collections.abc import Iterator
from typing import Any

from r1_grading.base.errors import shorten

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

ROW_KEYS = (
    "id",
    "title",
    "description",
    "input_format",
    "output_format",
    "interaction_format",
    "note",
    "examples",
    "official_tests",
    "official_tests_complete",
    "input_mode",
    "generated_checker",
    "time_limit",
    "memory_limit",
    "rating",
)
COLUMN_NAMES = {name: name for name in ROW_KEYS}
CPU_SECONDS, MEMORY_MIB = 2.0, 256
"""Codeforces' usual limits, for problems that name none."""
PYTHON_MEMORY_MIB, CPP_EXTRA_MIB = 1_024, 64
LANGUAGE_LABELS = {"cpp": "C++17", "python": "Python 3"}


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the problems whose rating is within the options.

    Raises:
        UserError: an unknown language.
    """
    language = options["language"]
    if language not in LANGUAGE_LABELS:
        raise UserError(
            f"codeforces: language {language!r} is not one of {', '.join(LANGUAGE_LABELS)}",
            key="options.language",
            cause=Cause.UNKNOWN,
        )
    lowest, highest = options["min_rating"] or 0, options["max_rating"] or math.inf
    for location, row in rows:
        columns = pick_columns(location, row, [COLUMN_NAMES])
        is_batch = not columns["interaction_format"] and columns["input_mode"] in (None, "stdio")
        has_tests = columns["official_tests_complete"] and columns["official_tests"]
        if is_batch and has_tests and lowest <= (columns["rating"] or 0) <= highest:
            yield _problem_question(location, columns, language)


def files(options: Options) -> list[str]:
    """Return the files of the subset in `options`."""
    folder = "verifiable" if options["subset"] == "verifiable" else "data"
    return [f"{folder}/test-*.parquet"]


def _problem_question(location: str, row: dict[str, Any], language: str) -> Question:
    """Return a problem as Codeforces shows it, with its tests as the truth."""
    description = require_text(location, row, "description").strip()
    sections = [f"# {row['title']}", description]
    for title, name in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if row[name]:
            sections.append(f"## {title}\n{row[name].strip()}")
    for number, example in enumerate(row["examples"] or [], start=1):
        sections.append(
            f"## Example {number}\nInput:\n```\n{example['input'].rstrip()}\n```\n"
            f"Output:\n```\n{example['output'].rstrip()}\n```"
        )
    sections.append(
        f"Time limit: {row['time_limit']} s. Memory limit: {row['memory_limit']} MB. "
        f"Write a {LANGUAGE_LABELS[language]} program that reads from standard input and writes to "
        f"standard output. Give the whole program in one ```{language} block."
    )
    try:
        tests = [{"stdin": t["input"], "stdout": t["output"]} for t in row["official_tests"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{location}: 'official_tests' must be a list of tests with 'input' and 'output', got "
            f"{shorten(repr(row['official_tests']))}; correct or remove the row",
            key="official_tests",
            cause=Cause.MALFORMED,
        ) from error
    truth: dict[str, Any] = {"tests": tests}
    if row["generated_checker"]:
        truth["checker"] = row["generated_checker"]
    memory = row["memory_limit"] or MEMORY_MIB
    # The limit is on address space, of which an interpreter reserves much more than it uses.
    memory = max(memory, PYTHON_MEMORY_MIB) if language == "python" else memory + CPP_EXTRA_MIB
    limits = code_limits(row["time_limit"] or CPU_SECONDS, memory, len(tests))
    fields = {"language": language, "limits": limits}
    return Question(str(row["id"]), "\n\n".join(sections), "code", truth, fields)


BENCHMARK = Benchmark(
    questions,
    hubs={"open-r1/codeforces": files},
    options={"language": "cpp", "subset": "default", "min_rating": None, "max_rating": None},
)
