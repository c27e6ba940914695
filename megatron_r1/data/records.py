"""Records of a file or a data set, each with its location, "file:line"."""

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_r1.data.hub import is_data_set, read_data_set
from megatron_r1.data.table_files import read_rows
from megatron_r1.errors import UserError, did_you_mean

Record = dict[str, Any]
ABSENT = object()


def read_records(
    path: str | Path, columns: Mapping[str, str] | None = None, names: Collection[str] = ()
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) for each row of a .jsonl, .json, .csv or .parquet file, in file
    order, or of a data set: a folder or `hub:NAME[:CONFIG][:SPLIT]`.

    columns: our name → the file's name, `a.b` for the entry b of a column of mappings; other
    columns are kept. names: the columns that the caller reads. Raises UserError with file and line
    for a row that is not an object or lacks a mapped column, for what cannot be read, and for one
    of `names` misspelt in `columns`."""
    columns = columns or {}
    rows = read_data_set(str(path)) if is_data_set(path) else read_rows(Path(path))
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


def _rename(location: str, row: Record, columns: Mapping[str, str]) -> Record:
    found = {ours: _entry(row, theirs) for ours, theirs in columns.items()}
    for ours, theirs in columns.items():
        if found[ours] is ABSENT:
            near = did_you_mean(theirs, row, "{}")
            raise UserError(
                f"{location}: no column {theirs!r}, as columns.{ours} says{near}; it has "
                f"{', '.join(row)}"
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | found


def _entry(row: Record, name: str) -> Any:
    """Return row[name], or row[a][b] for a name `a.b` that is no column itself; else ABSENT."""
    if name in row or "." not in name:
        return row.get(name, ABSENT)
    first, _, rest = name.partition(".")
    below = row.get(first)
    return _entry(below, rest) if isinstance(below, dict) else ABSENT
