"""Rows of a benchmark: from a file, a folder, or a data set on the Hugging Face hub.

From the hub only files are downloaded, and read here. Loading scripts of data sets are never run,
and the `datasets` library is not needed; Parquet needs pyarrow."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.table_files import READERS, Row
from megatron_r1.data.table_files import read_rows as read_file

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Rows = Iterable[Row]
Options = Mapping[str, Any]
Hubs = Mapping[str, Callable[[Options], Sequence[str]]]
"""Repository → the files (glob patterns) that are the benchmark, as in `Benchmark.hubs`."""


def read_rows(
    name: str, hubs: Hubs, options: Options, path: str | None, files: Sequence[str]
) -> Iterator[Row]:
    """Yield every row of a benchmark.

    Args:
        name: the benchmark's, for errors.
        hubs: repository → its files, as in `Benchmark.hubs`.
        options: the benchmark's options.
        path: a file, a folder, a hub name, or None for the first of `hubs`.
        files: glob patterns of the files of a folder or repository; () for the benchmark's own.

    Raises:
        UserError: a place, file or row that cannot be read; it names the remedy."""
    hub = next(iter(hubs))
    place = path or hub
    local = Path(place)
    if local.is_file():
        yield from read_file(local, "path")
        return
    if not local.exists():
        if not HUB_NAME.fullmatch(place):
            raise UserError(
                f"benchmark {name}: no such file or folder {place}; give a file, a folder, or a "
                f"data set's name on the hub such as {hub}",
                key="path",
                cause=Cause.NOT_FOUND,
            )
        if not files and place not in hubs:
            raise UserError(
                f"benchmark {name}: which files of {place} are it? Name them, for example "
                f"files: ['data/test-*.parquet']; known without: {', '.join(hubs)}",
                key="files",
                cause=Cause.MISSING,
            )
        patterns = files or hubs[place](options)
        local = _download(name, place, patterns)
    else:
        patterns = files or [p for known in hubs.values() for p in known(options)]
    yield from _read_folder(name, local, patterns)


def pick_columns(
    place: str, row: Mapping[str, Any], layouts: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Return the row under the project's names, by the first layout whose columns it has.

    Args:
        place: "file:line", for errors.
        row: column → value; columns that the layout does not have are dropped.
        layouts: for each, the project's name → the column's.

    Raises:
        UserError: no layout fits; it names the missing and the present columns."""
    for layout in layouts:
        if all(column in row for column in layout.values()):
            return {ours: row[column] for ours, column in layout.items()}
    nearest = max(layouts, key=lambda layout: sum(column in row for column in layout.values()))
    missing = [column for column in nearest.values() if column not in row]
    raise UserError(
        f"{place}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, row))}: "
        "is this the right file?",
        key=missing[0],
        cause=Cause.MISSING,
    )


def _download(name: str, hub: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub, repo_type="dataset", allow_patterns=list(patterns))
    # By version it raises its own errors, requests' or httpx's; all mean that the download failed.
    except Exception as error:
        raise UserError(
            f"benchmark {name}: {hub} cannot be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). A gated data set needs "
            f"`hf auth login`; without a network: hf download {hub} --repo-type dataset "
            "--local-dir FOLDER on another machine, and path: FOLDER here",
            key="path",
            cause=Cause.UNREADABLE,
        ) from error
    return Path(folder)


def _read_folder(name: str, folder: Path, patterns: Sequence[str]) -> Iterator[Row]:
    data_files = sorted(p for p in folder.rglob("*") if p.suffix in READERS and p.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in data_files}
    chosen = [p for p in data_files if any(fnmatch.fnmatch(names[p], glob) for glob in patterns)]
    if not chosen and len(data_files) == 1:
        chosen = data_files
    if not chosen:
        raise UserError(
            f"benchmark {name}: {folder} has no file like {', '.join(patterns)}; "
            f"it has {', '.join(names.values()) or 'no data files'}: name them with files: […]",
            key="files",
            cause=Cause.NOT_FOUND,
        )
    for path in chosen:
        yield from read_file(path, "path")
