"""Records of a file or a data set, each with its location, "file:line". Data sets, of the Hugging
Face hub or a folder, are read by the library `datasets`."""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_r1.data.table_files import Row, read_rows
from megatron_r1.errors import Cause, UserError, did_you_mean

Record = dict[str, Any]
ABSENT = object()
HUB = "hub:"
NAME = re.compile(r"(?P<name>[^:]+)(?::(?P<config>[^:\[]*))?(?::(?P<split>.+))?")
SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")
SAVED = ("dataset_dict.json", "state.json")
"""Files that mark a folder as one of `save_to_disk`."""


def read_records(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    names: Collection[str] = (),
    role: str = "data",
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) for each row of a .jsonl, .json, .csv or .parquet file, in file
    order, or of a data set: a folder or `hub:NAME[:CONFIG][:SPLIT]`.

    columns: our name → the file's name, `a.b` for the entry b of a column of mappings; other
    columns are kept. names: the columns that the caller reads. role: the key of errors, such as the
    setting that names the file. Raises UserError with file and line for a row that is not an object
    or lacks a mapped column, for what cannot be read, and for one of `names` misspelt in `columns`.
    """
    columns = columns or {}
    is_data_set = str(path).startswith(HUB) or Path(path).is_dir()
    rows = _read_data_set(str(path), role) if is_data_set else read_rows(Path(path), role)
    for ours in columns:
        # Rewards may read columns of any name, but hardly of one so close to ours.
        near = [] if ours in names else get_close_matches(ours, names, n=1, cutoff=0.8)
        if near and near[0] not in columns:
            raise UserError(
                f"{path}: columns.{ours}: did you mean columns.{near[0]}?",
                key=f"columns.{ours}",
                cause=Cause.UNKNOWN,
            )
    for location, row in rows:
        yield location, _rename(location, row, columns)


def require_text(location: str, record: Record, name: str, renaming: str = "") -> str:
    """Return record[name]; raises UserError unless it is a string that is not blank. renaming: as
    in `missing`."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        actual = f"is {value!r}" if name in record else missing(record, name, renaming)
        raise UserError(
            f"{location}: {name!r} must be a string that is not blank, it {actual}",
            key=name,
            cause=Cause.MALFORMED if name in record else Cause.MISSING,
        )
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
                f"{', '.join(row)}",
                key=f"columns.{ours}",
                cause=Cause.NOT_FOUND,
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


def _read_data_set(path: str, role: str) -> Iterator[Row]:
    """Yield the rows of `hub:NAME[:CONFIG][:SPLIT]`, NAME on the hub or a folder, or of `FOLDER`.

    A folder is one of `save_to_disk`, or holds data files. Without SPLIT: train, or the only one.
    `hub:NAME:test` is a split, too. Raises UserError for a missing library or data set, an unknown
    config or split, and where the hub cannot be reached."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: data sets and folders are read by a library that is not installed: pip "
            "install datasets; a .jsonl, .json or .csv file needs none",
            key="datasets",
            cause=Cause.NOT_INSTALLED,
        ) from None
    name, config, split = parse_name(path, role)
    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            loaded = datasets.load_from_disk(name)
        else:
            # By keyword: of datasets' many arguments these two are stable.
            loaded = datasets.load_dataset(name, name=config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        remedy = "correct the name, or log in: hf auth login"
        raise UserError(
            f"{path}: {_first_line(error)}; {remedy}", key=role, cause=Cause.NOT_FOUND
        ) from None
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"{path}: the hub cannot be reached ({_first_line(error)}). Without a network: hf "
            f"download {name} --repo-type dataset --local-dir FOLDER on another machine, and FOLDER"
            " here",
            key=role,
            cause=Cause.UNREADABLE,
        ) from None
    except Exception as error:  # noqa: BLE001 - of many kinds, all about the data set
        raise UserError(f"{path}: {_first_line(error)}", key=role, cause=Cause.MALFORMED) from None
    for number, row in enumerate(_split_of(loaded, split, path, role), start=1):
        yield f"{path}, row {number}", row


def parse_name(path: str, role: str = "data.path") -> tuple[str, str | None, str | None]:
    """Return (name, config, split) of `hub:NAME[:CONFIG][:SPLIT]` or of a folder."""
    if not path.startswith(HUB):
        return path, None, None
    match = NAME.fullmatch(path.removeprefix(HUB))
    if not match:
        raise UserError(
            f"data.path: {path} has no name; write hub:NAME[:CONFIG][:SPLIT]",
            key=role,
            cause=Cause.MALFORMED,
        )
    name, config, split = match["name"], match["config"] or None, match["split"]
    if config and split is None and SPLIT.fullmatch(config):
        config, split = None, config
    return name, config, split


def _split_of(loaded: Any, split: str | None, path: str, role: str) -> Any:
    """Return the rows of a split. loaded: a data set, or one per split."""
    if not isinstance(loaded, dict):
        return loaded
    if split is None:
        split = "train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
    if split not in loaded:
        known = ", ".join(loaded)
        raise UserError(
            f"{path}: which split? It has {known}: write hub:NAME:CONFIG:SPLIT",
            key=role,
            cause=Cause.UNKNOWN if split else Cause.MISSING,
        )
    return loaded[split]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
