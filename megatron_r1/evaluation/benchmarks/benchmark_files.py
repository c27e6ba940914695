"""The rows of a benchmark: of a file, a folder, or a data set on the Hugging Face hub.

From the hub only files are downloaded, and read here. Loading scripts of data sets are never run,
and the `datasets` library is not needed; Parquet needs pyarrow. `data.dataset_files` chooses the
files of a split; here a benchmark or the recipe names them by patterns."""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.table_files import READER_BY_SUFFIX, LocatedRow
from megatron_r1.data.table_files import read_rows as read_file
from megatron_r1.evaluation.benchmarks.base import Options

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Hubs = Mapping[str, Callable[[Options], Sequence[str]]]
"""Repository → the files (glob patterns) that are the benchmark, as in `Benchmark.hubs`."""


def read_rows(
    name: str, hubs: Hubs, options: Options, path: str | None, files: Sequence[str]
) -> Iterator[LocatedRow]:
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
    location = path or hub
    local = Path(location)
    if local.is_file():
        yield from read_file(local, "path")
        return
    if not local.exists():
        if not HUB_NAME.fullmatch(location):
            raise UserError(
                f"benchmark {name}: no such file or folder {location}; give a file, a folder, or a "
                f"data set's name on the hub such as {hub}",
                key="path",
                cause=Cause.NOT_FOUND,
            )
        if not files and location not in hubs:
            raise UserError(
                f"benchmark {name}: which files of {location} are it? Name them, for example "
                f"files: ['data/test-*.parquet']; known without: {', '.join(hubs)}",
                key="files",
                cause=Cause.MISSING,
            )
        patterns = files or hubs[location](options)
        local = _download_data_set(name, location, patterns)
    else:
        patterns = files or [p for hub_patterns in hubs.values() for p in hub_patterns(options)]
    yield from _read_folder(name, local, patterns)


def _download_data_set(name: str, hub: str, patterns: Sequence[str]) -> Path:
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


def _read_folder(name: str, folder: Path, patterns: Sequence[str]) -> Iterator[LocatedRow]:
    data_files = sorted(
        p for p in folder.rglob("*") if p.suffix in READER_BY_SUFFIX and p.is_file()
    )
    names = {path: path.relative_to(folder).as_posix() for path in data_files}
    matching_files = [
        p for p in data_files if any(fnmatch.fnmatch(names[p], glob) for glob in patterns)
    ]
    if not matching_files and len(data_files) == 1:
        matching_files = data_files
    if not matching_files:
        raise UserError(
            f"benchmark {name}: {folder} has no file like {', '.join(patterns)}; "
            f"it has {', '.join(names.values()) or 'no data files'}: name them with files: […]",
            key="files",
            cause=Cause.NOT_FOUND,
        )
    for path in matching_files:
        yield from read_file(path, "path")
