"""Rows of a file, by its format: JSONL, Parquet, JSON or CSV. Each comes with "file:line"."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_r1.errors import Cause, UserError

NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*")
Row = tuple[str, dict[str, Any]]
"""("file:line", columns)"""


def read_rows(path: Path, role: str = "data") -> Iterator[Row]:
    """Yield the rows of a file in its order; blank JSONL lines are skipped. role: the key of
    errors, such as the setting that names the file. Raises UserError for a file that is missing or
    of another format, and with file and line for a row that is none."""
    if not path.is_file():
        where = "" if path.is_absolute() else f" (relative to {Path.cwd()})"
        raise UserError(f"{path}: no such file{where}", key=role, cause=Cause.NOT_FOUND)
    if path.suffix not in READERS:
        hint = "; tabs are read in a .csv: rename it" if path.suffix == ".tsv" else ""
        raise UserError(
            f"{path}: expected a {' or '.join(READERS)} file{hint}",
            key=role,
            cause=Cause.UNSUPPORTED,
        )
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty", key=role, cause=Cause.EMPTY)
    yield from READERS[path.suffix](path, role)


def describe_json_error(error: Exception) -> str:
    """Describe what is wrong with one line of JSONL, and at which column of the line: the decoder
    counts lines within its input, which is a single line here."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_jsonl(path: Path, role: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                row = json.loads(line.strip())
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
                raise UserError(
                    f"{location}: not JSON: {describe_json_error(error)}",
                    key=role,
                    cause=Cause.MALFORMED,
                ) from error
            if not isinstance(row, dict):
                hint = "; a file that is one list is .json: rename it"
                raise UserError(
                    f"{location}: expected an object, got {type(row).__name__}"
                    + (hint if isinstance(row, list) else ""),
                    key=role,
                    cause=Cause.MALFORMED,
                )
            yield location, row


def _read_parquet(path: Path, role: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow: pip install pyarrow",
            key="pyarrow",
            cause=Cause.NOT_INSTALLED,
        ) from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{path}: no readable Parquet file: {error}", key=role, cause=Cause.MALFORMED
        ) from None


def _read_json(path: Path, role: str) -> Iterator[Row]:
    """Yield the rows of a list, or of the list under "data", "rows" or "test" of an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON: {error}; a file of one object a line is .jsonl",
            key=role,
            cause=Cause.MALFORMED,
        ) from (error)
    if isinstance(content, dict):
        content = next((content[k] for k in ("data", "rows", "test") if k in content), None)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path}: expected a list of objects", key=role, cause=Cause.MALFORMED)
    for number, row in enumerate(content):
        yield f"{path}[{number}]", row


def _read_csv(path: Path, role: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line has the names; every value is text. Names and
    values are separated by commas, or by semicolons or tabs where the first line has more of
    these. A row of several lines has the number of its last."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            if name := next(filter(NUMBER.fullmatch, reader.fieldnames or ()), None):
                raise UserError(
                    f"{path}:1: the first line has to name the columns, and one is {name}: put a "
                    "line such as question,truth before it",
                    key=role,
                    cause=Cause.MALFORMED,
                )
            for row in reader:
                location = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(
                        f"{location}: not as many fields as the header has; put a field with "
                        f"a {delimiter!r} in it between double quotes",
                        key=role,
                        cause=Cause.MALFORMED,
                    )
                yield location, row
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason}); save it as such", key=role, cause=Cause.MALFORMED
        ) from None


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".csv": _read_csv,
}
