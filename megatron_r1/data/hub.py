"""Rows of a data set of the Hugging Face hub, or of a folder, by the library `datasets`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.data.table_files import Row
from megatron_r1.errors import UserError

HUB = "hub:"
NAME = re.compile(r"(?P<name>[^:]+)(?::(?P<config>[^:\[]*))?(?::(?P<split>.+))?")
SPLIT = re.compile(r"(train|test|validation)(\[.*\])?")
SAVED = ("dataset_dict.json", "state.json")
"""Files that mark a folder as one of `save_to_disk`."""


def is_data_set(path: str | Path) -> bool:
    """Return whether a path stands for a data set, `hub:…` or a folder, rather than for a file."""
    return str(path).startswith(HUB) or Path(path).is_dir()


def read_data_set(path: str) -> Iterator[Row]:
    """Yield the rows of `hub:NAME[:CONFIG][:SPLIT]`, NAME on the hub or a folder, or of `FOLDER`.

    A folder is one of `save_to_disk`, or holds data files. Without SPLIT: train, or the only one.
    `hub:NAME:test` is a split, too. Raises UserError for a missing library or data set, an unknown
    config or split, and where the hub cannot be reached."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: data sets and folders are read by a library that is not installed: pip "
            "install datasets; a .jsonl, .json or .csv file needs none"
        ) from None
    name, config, split = parse_name(path)
    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            loaded = datasets.load_from_disk(name)
        else:
            # By keyword: of datasets' many arguments these two are stable.
            loaded = datasets.load_dataset(name, name=config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        remedy = "correct the name, or log in: hf auth login"
        raise UserError(f"{path}: {_first_line(error)}; {remedy}") from None
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"{path}: the hub cannot be reached ({_first_line(error)}). Without a network: hf "
            f"download {name} --repo-type dataset --local-dir FOLDER on another machine, and FOLDER"
            " here"
        ) from None
    except Exception as error:  # noqa: BLE001 - of many kinds, all about the data set
        raise UserError(f"{path}: {_first_line(error)}") from None
    for number, row in enumerate(_split_of(loaded, split, path), start=1):
        yield f"{path}, row {number}", row


def parse_name(path: str) -> tuple[str, str | None, str | None]:
    """Return (name, config, split) of `hub:NAME[:CONFIG][:SPLIT]` or of a folder."""
    if not path.startswith(HUB):
        return path, None, None
    match = NAME.fullmatch(path.removeprefix(HUB))
    if not match:
        raise UserError(f"data.path: {path} has no name; write hub:NAME[:CONFIG][:SPLIT]")
    name, config, split = match["name"], match["config"] or None, match["split"]
    if config and split is None and SPLIT.fullmatch(config):
        config, split = None, config
    return name, config, split


def _split_of(loaded: Any, split: str | None, path: str) -> Any:
    """Return the rows of a split. loaded: a data set, or one per split."""
    if not isinstance(loaded, dict):
        return loaded
    if split is None:
        split = "train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
    if split not in loaded:
        known = ", ".join(loaded)
        raise UserError(f"{path}: which split? It has {known}: write hub:NAME:CONFIG:SPLIT")
    return loaded[split]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
