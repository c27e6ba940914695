"""LiveCodeBench code generation (Jain et al., arXiv 2403.07974), in the layout of
livecodebench/code_generation_lite.

Problems have the date of their contest: `from` and `to` select those after the end of a model's
training data. DeepSeek-R1 reports 2024-08 to 2025-01.

Private tests are base64 of zlib of a pickle of JSON text, read without unpickling: unpickling a
downloaded file may run code from it. Only pickles whose instructions build plain texts, numbers,
lists and mappings are accepted; they are checked before anything is built."""

import base64
import binascii
import io
import json
import pickle
import pickletools
import zlib
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

from r1_grading.base.errors import shorten
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

MAX_BYTES = 2**30
"""Unpacked size of one problem's tests: the largest known is under 100 MB."""
PLAIN_OPCODES = frozenset(
    ("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
    + ("GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE")
    + ("INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT")
    + ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
    + ("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS")
    + ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
)
MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
FILE_REMEDY = "download the file again, or remove the row"


class _PlainUnpickler(pickle.Unpickler):
    """A second check: no class or function is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it refers to {module}.{name}")


def decode_tests(packed_tests: str, location: str) -> list[dict[str, Any]]:
    """Return the test cases of a row; nothing in them is ever executed.

    Args:
        packed_tests: JSON text, plain or as packed by the data set.
        location: where the row is, for errors.

    Raises:
        UserError: anything else."""
    try:
        tests = (
            json.loads(packed_tests)
            if packed_tests.lstrip()[:1] in ("[", "{")
            else _unpack_tests(packed_tests)
        )
        if isinstance(tests, str):
            tests = json.loads(tests)
    except (ValueError, TypeError, binascii.Error, zlib.error, pickle.UnpicklingError) as error:
        raise UserError(
            f"{location}: its tests cannot be read: {error}; they begin "
            f"{shorten(packed_tests, 40)}: {FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    except (EOFError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{location}: its tests are damaged: {error!r}; they begin "
            f"{shorten(packed_tests, 40)}: {FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        ) from error
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise UserError(
            f"{location}: its tests must be a list of objects, got {type(tests).__name__}; "
            f"{FILE_REMEDY}",
            key="private_test_cases",
            cause=Cause.MALFORMED,
        )
    return tests


def _unpack_tests(packed_tests: str) -> Any:
    inflater = zlib.decompressobj()
    content = inflater.decompress(base64.b64decode(packed_tests, validate=True), MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"more than {MAX_BYTES:,} bytes when unpacked")
    # The C unpickler allocates memory for the largest memo index, so the indices are bounded.
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in PLAIN_OPCODES:
            raise ValueError(f"its pickle holds {opcode.name}, which plain data does not need")
        if opcode.name in MEMO_OPCODES and int(argument or 0) > number:
            raise ValueError(f"its pickle's memo index {argument} is too large")
    return _PlainUnpickler(io.BytesIO(content)).load()


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
