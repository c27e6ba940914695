"""Records of a JSONL or Parquet file, each with its location, "file:line"."""

import json
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_r1.errors import UserError, did_you_mean

Record = dict[str, Any]


def read_records(
    path: str | Path, columns: Mapping[str, str] | None = None, names: Collection[str] = ()
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) for each row of a `.jsonl` or `.parquet` file, in file order.

    columns: our name → the file's name; other columns are kept. names: the columns that the caller
    reads. Blank JSONL lines are skipped. Raises UserError with file and line for a row that is not
    an object or lacks a mapped column, for a file that is missing or of another type, and for one
    of `names` misspelt in `columns`."""
    path, columns = Path(path), columns or {}
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        where = "" if path.is_absolute() else f" (relative to {Path.cwd()})"
        raise UserError(f"{path}: {what}{where}")
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: expected a .jsonl or .parquet file")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    for ours in columns:
        # Rewards may read columns of any name, but hardly of one so close to ours.
        near = [] if ours in names else get_close_matches(ours, names, n=1, cutoff=0.8)
        if near and near[0] not in columns:
            raise UserError(f"{path}: columns.{ours}: did you mean columns.{near[0]}?")
    for location, row in rows:
        yield location, _rename(location, row, columns)


def require_text(location: str, record: Record, name: str, renaming: str = "") -> str:
    """Return record[name]; raises UserError unless it is a string that is not blank. renaming: as
    in `missing`."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        actual = f"is {value!r}" if name in record else missing(record, name, renaming)
        raise UserError(f"{location}: {name!r} must be a string that is not blank, it {actual}")
    return value


def missing(record: Record, name: str, renaming: str = "") -> str:
    """Describe the lack of `name` in `record`. renaming: the setting that maps column names."""
    hint = f"; if one of them is meant: {renaming}: {{{name}: …}}" if renaming and record else ""
    return f"is missing; the row has {', '.join(record) or 'nothing'}{hint}"


def describe_json_error(error: Exception) -> str:
    """Describe what is wrong with one line of JSONL, and at which column of the line: the decoder
    counts lines within its input, which is a single line here."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _rename(location: str, row: Record, columns: Mapping[str, str]) -> Record:
    for ours, theirs in columns.items():
        if theirs not in row:
            near = did_you_mean(theirs, row, "{}")
            raise UserError(
                f"{location}: no column {theirs!r}, as columns.{ours} says{near}; it has "
                f"{', '.join(row)}"
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                row = json.loads(line.strip())
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
                raise UserError(f"{location}: not JSON: {describe_json_error(error)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{location}: expected an object, got {type(row).__name__}")
            yield location, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: no readable Parquet file: {error}") from None
