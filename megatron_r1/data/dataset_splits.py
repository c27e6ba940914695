"""Chooses the files of a data set that make a split, by their names and its README.

Configurations and splits are those that the README of the data set lists, else those that its file
names show: `main/train-00000-of-00001.parquet` is split train of configuration main."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.table_files import data_suffix

SLICE = re.compile(r"(?P<split>[^\[]+)(?:\[(?P<start>\d*)(?P<p1>%?):(?P<stop>\d*)(?P<p2>%?)\])?")
SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
"""A word of a file's name → the split of the file."""
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?")
NO_DATA = ("dataset_infos.json", "dataset_info.json", "config.json", "package.json")


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


def choose_split_files(
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
    files = configs[
        choose_known_name("configuration", path, configs, config, ("default", "main"), key)
    ]
    split_name = parse_split_name(split, path, key)
    name = choose_known_name("split", path, files, split_name.name or None, ("train",), key)
    return files[name], SplitName(name, split_name.start, split_name.stop, split_name.is_percent)


def choose_known_name(
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


def parse_split_name(split: str | None, path: str, key: str) -> SplitName:
    """Return what a recipe writes for a split: `train`, or some rows of it, `train[:200]`.

    Args:
        split: the recipe's text; None: an empty name is returned.
        path: the data set, for errors.
        key: the setting that names it, for errors.

    Raises:
        UserError: the text is neither.
    """
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
