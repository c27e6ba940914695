"""Files that others wrote: JSON is read in bounded time, and no file elsewhere is opened.

A folder that was downloaded may hold anything: JSON nested so deeply that every copy of it fails,
a key twice with two values, names and links that lead to other files of this machine."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError

MAX_LEVELS = 64
"""Levels of a JSON document. Released configurations have 6 at most."""
MAX_BYTES = 256 << 20
"""Size of a JSON document: the index of 100,000 tensors has 10 MB, the largest tokenizers 40."""

READABLE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin")
"""Suffixes of the files of a model folder that this project, transformers or vLLM read."""


def read_json(path: Path, key: str) -> Any:
    """Return the content of a JSON file, UTF-8.

    Args:
        path: a file that others wrote.
        key: the key of errors.

    Raises:
        UserError: naming the file where it is no JSON, has a key twice with two values, more than
            MAX_LEVELS levels, or more than MAX_BYTES bytes.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, and at most {MAX_BYTES:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        _check_levels(content)
        return content
    except (ValueError, RecursionError) as error:
        too_deep = isinstance(error, RecursionError)
        reason = f"it has more than {MAX_LEVELS} levels" if too_deep else str(error)
        raise UserError(
            f"{path} is not valid JSON: {reason}; fetch it again", key=key, cause=Cause.MALFORMED
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content and content[name] != value:
            raise ValueError(f"{name!r} is there twice, with two values")
        content[name] = value
    return content


def _check_levels(content: Any) -> None:
    level = [content]
    for _ in range(MAX_LEVELS):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecursionError


def require_files_inside(folder: Path, key: str) -> None:
    """Raise UserError for a file of a model folder, of those that anything reads, that lies
    elsewhere (`require_inside`)."""
    for path in sorted(folder.iterdir()):
        if path.suffix in READABLE_SUFFIXES:
            require_inside(path, folder, key)


def require_inside(path: Path, folder: Path, key: str) -> None:
    """Raise UserError for a file of `folder` that lies elsewhere, by its name or a link. A folder
    of the hub's cache (`snapshots/REVISION`) may link to the `blobs` next to it.

    Nothing of the file is read.

    Args:
        path: the file.
        folder: the model's folder.
        key: the key of the error.
    """
    home, real_path = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(Path(os.path.realpath(home.parent.parent / "blobs")))
    if not any(real_path.is_relative_to(allowed) for allowed in homes):
        raise UserError(
            f"{path} leads to {real_path}, outside of {folder}, and is not opened; if that file "
            "belongs to the model, copy it into the folder",
            key=key,
            cause=Cause.CONFLICT,
        )
