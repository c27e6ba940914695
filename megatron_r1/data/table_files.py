"""Rows of a file, by its format: JSONL, Parquet, JSON or CSV, the texts also compressed by gzip.
Each comes with "file:line"."""

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, AnyStr, cast

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.chats import is_chat

MAX_ROW_BYTES = 64 << 20
"""Bytes of a row; characters, where a file is read as text. What a longer line of JSON takes in
memory is up to who wrote it, and no prompt has so many."""
MAX_JSON_BYTES = 1 << 30
"""Bytes of a .json file, which is read whole."""
NUMBER_CELL = re.compile(r"[-+]?\d+(?:[.,]\d+)*")
GZIP = ".gz"
LIST_KEYS = ("data", "rows", "train", "test", "examples", "instances")
"""Keys under which a JSON file that is one object has its rows."""
LocatedRow = tuple[str, dict[str, Any]]
"""("file:line", columns)"""


def read_rows(path: Path, key: str = "data") -> Iterator[LocatedRow]:
    """Yield the rows of a file in its order; blank JSONL lines are skipped.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file.
        key: the key of errors, such as the setting that names the file.

    Raises:
        UserError: for a file that is missing or of another format, and with file and line for a
            malformed row.
    """
    if not path.is_file():
        hint = "" if path.is_absolute() else f" (relative to {Path.cwd()})"
        raise UserError(f"{path}: no such file{hint}", key=key, cause=Cause.NOT_FOUND)
    suffix = data_suffix(path)
    if suffix is None:
        raise UserError(
            f"{path}: expected a {' or '.join(READER_BY_SUFFIX)} file, the texts also as .gz",
            key=key,
            cause=Cause.UNSUPPORTED,
        )
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty", key=key, cause=Cause.EMPTY)
    try:
        for location, row in READER_BY_SUFFIX[suffix](path, key):
            if sum(len(value) for value in row.values() if isinstance(value, str)) > MAX_ROW_BYTES:
                raise _too_long(location, key)
            yield location, row
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(
            f"{path}: no whole gzip file: {error}; fetch it again", key=key, cause=Cause.MALFORMED
        ) from None


def _too_long(location: str, key: str) -> UserError:
    return UserError(
        f"{location}: the row has more than {MAX_ROW_BYTES:,} bytes, and is not read; remove it, "
        "or shorten its columns",
        key=key,
        cause=Cause.TOO_LARGE,
    )


def _read_lines(file: IO[AnyStr], path: Path, key: str) -> Iterator[AnyStr]:
    """Yield the lines of an open file; UserError for one that has more than MAX_ROW_BYTES, which is
    not read to its end."""
    for number in count(1):
        line = file.readline(MAX_ROW_BYTES + 1)
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(f"{path}:{number}", key)
        if not line:
            return
        yield line


def data_suffix(path: Path) -> str | None:
    """Return the format of a file by its name, a key of `READER_BY_SUFFIX`; None for another."""
    *_, suffix_before, last_suffix = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    suffix = suffix_before if last_suffix == GZIP and suffix_before != ".parquet" else last_suffix
    return suffix if suffix in READER_BY_SUFFIX else None


def _open_data_file(path: Path) -> IO[bytes]:
    if path.suffix.lower() == GZIP:
        return cast(IO[bytes], gzip.open(path))
    return path.open("rb")


def describe_json_error(error: Exception) -> str:
    """Describe what is wrong with one line of JSONL, and at which column of the line: the decoder
    counts lines within its input, which is a single line here."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_jsonl(path: Path, key: str) -> Iterator[LocatedRow]:
    with _open_data_file(path) as lines:
        for number, line in enumerate(_read_lines(lines, path, key), start=1):
            line = line.strip()
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8).strip()
                if _begins_a_list(line) and not _is_chat_line(line):
                    yield from _read_list(path, key)
                    return
            if not line:
                continue
            location = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
                raise UserError(
                    f"{location}: not JSON: {describe_json_error(error)}",
                    key=key,
                    cause=Cause.MALFORMED,
                ) from error
            if is_chat(row):
                row = {"messages": row}
            if not isinstance(row, dict):
                raise UserError(
                    f"{location}: expected an object, got {type(row).__name__}",
                    key=key,
                    cause=Cause.MALFORMED,
                )
            yield location, row


def _is_chat_line(line: bytes) -> bool:
    """Return whether a line is a whole conversation, as each line of the file then is."""
    try:
        return is_chat(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _begins_a_list(line: bytes) -> bool:
    """Return whether the first line of a file shows that the file is one list of objects."""
    return line.startswith(b"[") and line[1:].lstrip()[:1] in (b"", b"{")


def _read_parquet(path: Path, key: str) -> Iterator[LocatedRow]:
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
            f"{path}: no readable Parquet file: {error}", key=key, cause=Cause.MALFORMED
        ) from None


def _read_json(path: Path, key: str) -> Iterator[LocatedRow]:
    """Yield the rows of a list, of an object's list under one of `LIST_KEYS`, of a table of pandas,
    or of lines of objects. Many data sets name such lines .json."""
    with _open_data_file(path) as file:
        first = next(_read_lines(file, path, key)).removeprefix(codecs.BOM_UTF8)
        second_line = next(filter(bytes.strip, _read_lines(file, path, key)), b"")
    if _is_object(first) and second_line.lstrip().startswith(b"{"):
        yield from _read_jsonl(path, key)
    else:
        yield from _read_list(path, key)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_list(path: Path, key: str) -> Iterator[LocatedRow]:
    with _open_data_file(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise UserError(
            f"{path}: has more than {MAX_JSON_BYTES:,} bytes, and a .json file is read whole; "
            "write its rows as .jsonl, one object a line",
            key=key,
            cause=Cause.TOO_LARGE,
        )
    try:
        content = json.loads(text.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON: {error}; a file of one object a line is .jsonl",
            key=key,
            cause=Cause.MALFORMED,
        ) from error
    if isinstance(content, dict):
        lists = [content[k] for k in LIST_KEYS if isinstance(content.get(k), list)]
        rows = _only_list(content) or _pandas_rows(content) or ([content] if content else None)
        content = lists[0] if lists else rows
    if is_chat(content):
        content = [content]
    if isinstance(content, list):
        content = [{"messages": row} if is_chat(row) else row for row in content]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path}: expected a list of objects", key=key, cause=Cause.MALFORMED)
    for number, row in enumerate(content):
        yield f"{path}[{number}]", row


def _only_list(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the list of objects that an object has besides single values, under any name. None
    where there is none, where there are several, and for messages, which are one row."""
    containers = [value for value in content.values() if isinstance(value, list | dict)]
    if len(containers) != 1 or not isinstance(containers[0], list) or not containers[0]:
        return None
    is_rows = all(isinstance(row, dict) and len(row) > 1 for row in containers[0])
    return containers[0] if is_rows and not any(is_chat(value) for value in containers) else None


def _pandas_rows(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of a table as pandas writes it, None for any other object. It is
    {column: {"0": value, …}, …} or {"0": {column: value, …}, …}, whose rows may have any names:
    {"q7": {column: value, …}, …}."""
    parts = list(content.values())
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        return None
    if any(part.keys() != parts[0].keys() for part in parts):
        return None
    if all(key.isdecimal() for key in content):
        return parts
    if all(key.isdecimal() for key in parts[0]):
        return [{name: part[key] for name, part in content.items()} for key in parts[0]]
    return parts if len(parts) > 1 and len(parts[0]) > 1 else None


def _read_csv(path: Path, key: str) -> Iterator[LocatedRow]:
    """Yield the rows of a table whose first line has the names; every value is text. Names and
    values are separated by commas, or by semicolons, tabs or bars where the first line has more of
    these. Rows of blank values are skipped. A row of several lines has the number of its
    last."""
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        with (
            _open_data_file(path) as raw_file,
            io.TextIOWrapper(raw_file, "utf-8-sig", newline="") as file,
        ):
            delimiter = max(",;\t|", key=next(_read_lines(file, path, key)).count)
            file.seek(0)
            reader = csv.DictReader(_read_lines(file, path, key), delimiter=delimiter)
            names = list(reader.fieldnames or ())
            if repeated_name := next((n for n in names if n.strip() and names.count(n) > 1), None):
                raise UserError(
                    f"{path}:1: two columns have the name {repeated_name!r}; give each one of "
                    "its own",
                    key=key,
                    cause=Cause.DUPLICATE,
                )
            if name := next(filter(NUMBER_CELL.fullmatch, names), None):
                raise UserError(
                    f"{path}:1: the first line has to name the columns, and one is {name}: put a "
                    "line such as question,truth before it",
                    key=key,
                    cause=Cause.MALFORMED,
                )
            for row in reader:
                location = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(
                        f"{location}: not as many fields as the header has; put a field with "
                        f"a {delimiter!r} in it between double quotes",
                        key=key,
                        cause=Cause.MALFORMED,
                    )
                if any(value.strip() for value in row.values()):
                    yield location, row
    except csv.Error as error:
        raise UserError(
            f"{path}: not CSV: {error}; a quote may not be closed", key=key, cause=Cause.MALFORMED
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason}); save it as such", key=key, cause=Cause.MALFORMED
        ) from None


READER_BY_SUFFIX: dict[str, Callable[[Path, str], Iterator[LocatedRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
