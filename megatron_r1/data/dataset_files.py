"""The files of a data set: a folder's, or those of a data set on the Hugging Face hub.

Configurations and splits are those that the README of the data set lists, else those that its file
names show: `main/train-00000-of-00001.parquet` is split train of configuration main. What
`save_to_disk` has written is read by the library `datasets`."""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.table_files import LocatedRow, data_suffix, read_rows

HUB = "hub:"
DATASET_NAME = re.compile(r"(?P<name>[^:]+)(?::(?P<config>[^:\[]*))?(?::(?P<split>.+))?")
SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")
SLICE = re.compile(r"(?P<split>[^\[]+)(?:\[(?P<start>\d*)(?P<p1>%?):(?P<stop>\d*)(?P<p2>%?)\])?")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")
"""Files that mark a folder as one of `save_to_disk`."""
SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
"""A word of a file's name → the split of the file."""
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?")
NO_DATA = ("dataset_infos.json", "dataset_info.json", "config.json", "package.json")
README = "README.md"


@dataclass(frozen=True)
class SplitName:
    """A split, or some of its rows.

    Attributes:
        name: the split.
        start: the first row; None: that of the split.
        stop: the row after the last; None: all.
        is_percent: whether both are percent of the split."""

    name: str
    start: int | None = None
    stop: int | None = None
    is_percent: bool = False


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
        files, split_name = _choose_files(path, names, readme_text, config, split, key)
        sources = [(folder / file, str(folder / file)) for file in files]
    elif not path.startswith(HUB):
        raise UserError(f"{path}: no such file or folder", key=key, cause=Cause.NOT_FOUND)
    else:
        names, readme_text = _list_hub(path, name, key)
        files, split_name = _choose_files(path, names, readme_text, config, split, key)
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


def _choose_files(
    path: str,
    names: Sequence[str],
    readme: str,
    config: str | None,
    split: str | None,
    key: str,
) -> tuple[list[str], SplitName]:
    """Return the files of a split, and the split.

    Args:
        path: the data set, for errors.
        names: all files of the data set.
        readme: the text of its README, whose header may name files.
        config: the configuration to read; None: the default or only one.
        split: the split to read, which may be a part of one; None: train or the only one.
        key: the setting that names the data set, for errors."""
    data = [name for name in names if _is_data(name)]
    configs = _splits_from_readme(readme, data) or _splits_from_names(data)
    if not configs:
        raise UserError(
            f"{path}: it has no data files (.jsonl, .json, .csv, .tsv or .parquet)",
            key=key,
            cause=Cause.EMPTY,
        )
    if config is not None and config not in configs and split is None:
        matching_configs = [
            splits for splits in configs.values() if config.partition("[")[0] in splits
        ]
        if matching_configs:
            config, split = None, config
    files = configs[_choose_name("configuration", path, configs, config, ("default", "main"), key)]
    split_name = _parse_split(split, path, key)
    name = _choose_name("split", path, files, split_name.name or None, ("train",), key)
    return files[name], SplitName(name, split_name.start, split_name.stop, split_name.is_percent)


def _choose_name(
    noun: str,
    path: str,
    known_names: Mapping[str, Any],
    explicit_name: str | None,
    usual: Sequence[str],
    key: str,
) -> str:
    """Return the name that is asked for, else the usual or the only one.

    Args:
        noun: what is chosen, for errors.
        path: the data set.
        known_names: the names that it has.
        explicit_name: the name that is asked for, or None.
        usual: names that are chosen where none is asked for.
        key: the setting, for errors."""
    if explicit_name is not None and explicit_name in known_names:
        return explicit_name
    if explicit_name is None:
        for name in usual:
            if name in known_names:
                return name
        if len(known_names) == 1:
            return next(iter(known_names))
    form = "hub:NAME:CONFIG:SPLIT"
    raise UserError(
        f"{path}: which {noun}? It has {', '.join(known_names)}: write {form}",
        key=key,
        cause=Cause.MISSING if explicit_name is None else Cause.UNKNOWN,
    )


def _parse_split(split: str | None, path: str, key: str) -> SplitName:
    if split is None:
        return SplitName("")
    match = SLICE.fullmatch(split)
    if match is None:
        raise UserError(
            f"{path}: {split!r} is no split; write train, train[:200] or train[10%:20%]",
            key=key,
            cause=Cause.MALFORMED,
        )
    start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return SplitName(match["split"], start, stop, bool(match["p1"] or match["p2"]))


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name not in NO_DATA and data_suffix(Path(name)) is not None


def _splits_from_readme(readme: str, names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return configuration → split → files, as the head of a README lists them; {} without."""
    if not readme.startswith("---"):
        return {}
    try:
        head = yaml.safe_load(readme.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    listed_configs = head.get("configs") if isinstance(head, dict) else None
    splits_by_config: dict[str, dict[str, list[str]]] = {}
    for entry in listed_configs if isinstance(listed_configs, list) else ():
        files = entry.get("data_files") if isinstance(entry, dict) else None
        parts = files if isinstance(files, list) else [files]
        splits: dict[str, list[str]] = {}
        for part in parts:
            data_file = part if isinstance(part, dict) else {"split": "train", "path": part}
            patterns = data_file.get("path")
            patterns = patterns if isinstance(patterns, list) else [patterns]
            matching_names = [
                n for n in names if any(_matches_pattern(n, p) for p in patterns if p)
            ]
            if matching_names:
                splits.setdefault(str(data_file.get("split", "train")), []).extend(matching_names)
        if splits:
            splits_by_config[str(entry.get("config_name", "default"))] = splits
    return splits_by_config


def _matches_pattern(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(
        name, pattern.replace("**/", "")
    )


def _splits_from_names(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return configuration → split → files, as the names of the files show them."""
    configs: dict[str, dict[str, list[str]]] = {}
    for name in names:
        folders = [p for p in PurePosixPath(name).parts[:-1] if p != "data" and p not in SPLITS]
        config = "/".join(folders) or "default"
        configs.setdefault(config, {}).setdefault(_split_of_file(name), []).append(name)
    return configs


def _split_of_file(name: str) -> str:
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    words = re.split(r"[-_. ]", stem.lower())
    for word in [*path.parts[:-1], *words]:
        if word in SPLITS:
            return SPLITS[word]
    shard = SHARD.fullmatch(stem)
    return shard["split"] if shard else "train"


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
    """Yield the rows of a folder of `save_to_disk`.

    Args:
        path: the data set as the recipe names it.
        folder: its folder.
        split: the split that is asked for, or None.
        key: the setting, for errors."""
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
    split_name = _parse_split(split, path, key)
    if isinstance(dataset, dict):
        dataset = dataset[
            _choose_name("split", path, dataset, split_name.name or None, ("train",), key)
        ]
    start, stop = split_name.start, split_name.stop
    if split_name.is_percent:
        start, stop = (None if n is None else round(len(dataset) * n / 100) for n in (start, stop))
    numbered_rows = enumerate(itertools.islice(dataset, start, stop), start=1 + (start or 0))
    yield from ((f"{path}, row {number}", row) for number, row in numbered_rows)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
