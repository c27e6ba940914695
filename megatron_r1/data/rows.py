"""Rows of data files, under our names of columns, each with its location "file:line"."""

import glob
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from r1_grading.base.values import decode_literal

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.dataset_files import HUB, read_data_set
from megatron_r1.data.table_files import LocatedRow, read_rows

CanonicalRow = dict[str, Any]
ABSENT_VALUE = object()


def read_canonical_rows(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    names: Collection[str] = (),
    key: str = "data",
    keeps: Callable[[str, CanonicalRow], bool] = lambda location, row: True,
) -> Iterator[tuple[str, CanonicalRow]]:
    """Yield ("file:line", row) for each row of a file, in file order, of all files of a pattern, or
    of a data set. A file is .jsonl, .json, .csv, .tsv or .parquet, a pattern such as
    `rows/*.jsonl`, a data set a folder or `hub:NAME[:CONFIG][:SPLIT]`.

    Args:
        path: a file, a pattern of files, a folder, or a data set of the hub.
        columns: our name → the file's name, `a.b` for the entry b of a column of mappings; other
            columns are kept.
        names: the columns that the caller reads.
        key: the key of errors, such as the setting that names the file.
        keeps: a function of location and row that says whether the row is yielded.

    Raises:
        UserError: with file and line for a row that is not an object or lacks a mapped column, for
            what cannot be read, and for one of `names` misspelt in `columns`.
    """
    columns = columns or {}
    rows = _read_all_rows(path, key)
    for name in columns:
        # Rewards may read columns of any name, but hardly of one so close to one of these.
        matches = [] if name in names else get_close_matches(name, names, n=1, cutoff=0.8)
        if matches and matches[0] not in columns:
            raise UserError(
                f"{path}: columns.{name}: did you mean columns.{matches[0]}?",
                key=f"columns.{name}",
                cause=Cause.UNKNOWN,
            )
    for location, row in rows:
        if keeps(location, row):
            yield location, rename_columns(location, row, columns)


def _read_all_rows(path: str | Path, key: str) -> Iterator[LocatedRow]:
    if str(path).startswith(HUB) or Path(path).is_dir():
        return read_data_set(str(path), key)
    if not glob.has_magic(str(path)) or Path(path).exists():
        return read_rows(Path(path), key)
    files = sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise UserError(
            f"{path}: no file has such a name (relative to {Path.cwd()})",
            key=key,
            cause=Cause.NOT_FOUND,
        )
    return (row for file in files for row in read_rows(Path(file), key))


def require_text(location: str, row: CanonicalRow, name: str, renaming: str = "") -> str:
    """Return row[name], a string that is not blank.

    Args:
        location: "file:line", for errors.
        row: the row.
        name: the canonical name.
        renaming: as in `missing`.

    Raises:
        UserError: the row lacks it, or it is another value.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        actual_text = f"is {value!r}" if name in row else describe_missing(row, name, renaming)
        raise UserError(
            f"{location}: {name!r} must be a string that is not blank, it {actual_text}",
            key=name,
            cause=Cause.MALFORMED if name in row else Cause.MISSING,
        )
    return value


def describe_missing(row: CanonicalRow, name: str, renaming: str = "") -> str:
    """Describe the lack of `name` in `row`.

    Args:
        row: the row.
        name: the column that it lacks.
        renaming: the setting that maps column names."""
    hint = f"; if one of them is meant: {renaming}: {{{name}: …}}" if renaming and row else ""
    return f"is missing; the row has {', '.join(row) or 'nothing'}{hint}"


def rename_columns(location: str, row: CanonicalRow, columns: Mapping[str, str]) -> CanonicalRow:
    """Return the row with the columns under their canonical names.

    Args:
        location: "file:line", for errors.
        row: the row as the file has it.
        columns: canonical name → the file's.

    Raises:
        UserError: a column that the row lacks."""
    values = {name: lookup_column(row, source_column) for name, source_column in columns.items()}
    for name, source_column in columns.items():
        if values[name] is ABSENT_VALUE:
            unused_columns = [column for column in row if column not in columns.values()]
            suggestion = did_you_mean(source_column, unused_columns, "{}")
            raise UserError(
                f"{location}: no column {source_column!r}, as columns.{name} says{suggestion}; "
                f"it has {', '.join(row)}",
                key=f"columns.{name}",
                cause=Cause.NOT_FOUND,
            )
    source_columns = {part for column in columns.values() for part in (column, *column.split("+"))}
    kept_columns = {name: value for name, value in row.items() if name not in source_columns}
    return kept_columns | values


def lookup_column(row: CanonicalRow, name: str) -> Any:
    """Return row[name], or row[a][b] for a name `a.b` and {"a": row[a], "b": row[b]} for `a+b` that
    are no columns themselves; else `ABSENT_VALUE`."""
    if name in row:
        return row[name]
    if "+" in name:
        part_values = {part: row[part] for part in name.split("+") if part in row}
        return part_values or ABSENT_VALUE
    if "." not in name:
        return ABSENT_VALUE
    first, _, entry_path = name.partition(".")
    mapping = as_mapping(row.get(first))
    return ABSENT_VALUE if mapping is None else lookup_column(mapping, entry_path)


def as_mapping(value: Any) -> CanonicalRow | None:
    """Return a mapping, also of one that is stored as text; None for any other value."""
    value = decode_literal(value)
    return value if isinstance(value, dict) else None
