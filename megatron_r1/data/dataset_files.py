"""Reads the files of a data set: a folder's, or those of a data set on the Hugging Face hub.

`dataset_splits` chooses them. What `save_to_disk` has written is read by the library `datasets`."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.dataset_splits import (
    SplitName,
    choose_known_name,
    choose_split_files,
    parse_split_name,
)
from megatron_r1.data.table_files import LocatedRow, read_rows

HUB = "hub:"
DATASET_NAME = re.compile(r"(?P<name>[^:]+)(?::(?P<config>[^:\[]*))?(?::(?P<split>.+))?")
SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")
"""Files that mark a folder as one of `save_to_disk`."""
README = "README.md"


def parse_name(path: str, key: str = "data.path") -> tuple[str, str | None, str | None]:
    """Return (name, config, split) of `hub:NAME[:CONFIG][:SPLIT]` or of a folder.

    Raises:
        UserError: nothing that could be a name follows `hub:`.
    """
    if not path.startswith(HUB):
        return path, None, None
    match = DATASET_NAME.fullmatch(path.removeprefix(HUB))
    if not match:
        raise UserError(
            f"data.path: {path} has no name; write hub:NAME[:CONFIG][:SPLIT]",
            key=key,
            cause=Cause.MALFORMED,
        )
    name, config, split = match["name"], match["config"] or None, match["split"]
    if config and split is None and SPLIT.fullmatch(config):
        config, split = None, config
    return name, config, split


def read_data_set(path: str, key: str) -> Iterator[LocatedRow]:
    """Yield the rows of `hub:NAME[:CONFIG][:SPLIT]`, NAME on the hub or a folder, or of `FOLDER`.

    Without SPLIT: train, or the only one. `hub:NAME:test` is a split, too.

    Raises:
        UserError: the data set is missing, the configuration or split is unknown, or the hub cannot
            be reached.
    """
    name, config, split = parse_name(path, key)
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in SAVED_DATASET_FILES):
            yield from _read_saved(path, folder, split, key)
            return
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        readme = folder / README
        readme_text = (
            readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        )
        files, split_name = choose_split_files(path, names, readme_text, config, split, key)
        sources = [(folder / file, str(folder / file)) for file in files]
    elif not path.startswith(HUB):
        raise UserError(f"{path}: no such file or folder", key=key, cause=Cause.NOT_FOUND)
    else:
        names, readme_text = _list_hub(path, name, key)
        files, split_name = choose_split_files(path, names, readme_text, config, split, key)
        download_folder = _download_files(path, name, files, key)
        sources = [(download_folder / file, f"{HUB}{name}/{file}") for file in files]
    yield from _slice_rows(_located_rows(sources, key), sources, split_name, key)


def _located_rows(sources: Sequence[tuple[Path, str]], key: str) -> Iterator[LocatedRow]:
    for file, name in sources:
        for location, row in read_rows(file, key):
            yield f"{name}{location.removeprefix(str(file))}", row


def _slice_rows(
    rows: Iterator[LocatedRow], sources: Sequence[tuple[Path, str]], split_name: SplitName, key: str
) -> Iterator[LocatedRow]:
    start, stop = split_name.start, split_name.stop
    if split_name.is_percent:
        count = sum(1 for _ in _located_rows(sources, key))
        start, stop = (None if n is None else round(count * n / 100) for n in (start, stop))
    return itertools.islice(rows, start, stop)


def _list_hub(path: str, name: str, key: str) -> tuple[list[str], str]:
    """Return the names of a data set's files on the hub, and its README."""
    import huggingface_hub

    with _hub_errors(path, name, key):
        names = huggingface_hub.HfApi().list_repo_files(name, repo_type="dataset")
        if README not in names:
            return names, ""
        readme = huggingface_hub.hf_hub_download(name, README, repo_type="dataset")
    return names, Path(readme).read_text(encoding="utf-8", errors="replace")


def _download_files(path: str, name: str, files: Sequence[str], key: str) -> Path:
    import huggingface_hub

    with _hub_errors(path, name, key):
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", allow_patterns=[_quote_glob(file) for file in files]
            )
        )


def _quote_glob(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


class _hub_errors:  # noqa: N801 - a context manager, named like a function
    """Turns the errors of the hub's library into `UserError`."""

    def __init__(self, path: str, name: str, key: str) -> None:
        self.path, self.name, self.key = path, name, key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        from huggingface_hub import errors

        unknown_errors = (
            errors.RepositoryNotFoundError,
            errors.EntryNotFoundError,
            errors.HFValidationError,
        )
        if isinstance(error, unknown_errors) and not isinstance(
            error, errors.LocalEntryNotFoundError
        ):
            raise UserError(
                f"{self.path}: {_first_line(error)}; correct the name, or log in: hf auth login",
                key=self.key,
                cause=Cause.NOT_FOUND,
            ) from None
        raise UserError(
            f"{self.path}: the hub cannot be reached ({_first_line(error)}). Without a network: hf "
            f"download {self.name} --repo-type dataset --local-dir FOLDER on another machine, and "
            "FOLDER here",
            key=self.key,
            cause=Cause.UNREADABLE,
        ) from None


def _read_saved(path: str, folder: Path, split: str | None, key: str) -> Iterator[LocatedRow]:
    """Yield the rows of a folder of `save_to_disk`."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: a folder of save_to_disk is read by a library that is not installed: pip "
            "install datasets; files such as .parquet need none",
            key="datasets",
            cause=Cause.NOT_INSTALLED,
        ) from None
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # noqa: BLE001 - of many kinds, all about the data set
        raise UserError(f"{path}: {_first_line(error)}", key=key, cause=Cause.MALFORMED) from None
    split_name = parse_split_name(split, path, key)
    if isinstance(dataset, dict):
        dataset = dataset[
            choose_known_name("split", path, dataset, split_name.name or None, ("train",), key)
        ]
    start, stop = split_name.start, split_name.stop
    if split_name.is_percent:
        start, stop = (None if n is None else round(len(dataset) * n / 100) for n in (start, stop))
    numbered_rows = enumerate(itertools.islice(dataset, start, stop), start=1 + (start or 0))
    yield from ((f"{path}, row {number}", row) for number, row in numbered_rows)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
