"""Digests that tell whether a file or folder is still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WHOLE_BYTES = 256 * 1024**2
NUM_BLOCKS, BLOCK_BYTES = 64, 65_536
MISSING = "missing"
LENGTH = 16
NOT_OUTPUT = frozenset(
    ("begun.json", "checkpoints", "config.yaml", "logs", "report.html", "sample_log", "stage.json")
    + ("stop", "tensorboard")
)
"""What a stage leaves for itself and for people: nothing depends on its bytes."""


def digest(path: Path) -> str:
    """Of a file's content, or of the names and contents in a folder (hidden ones left out);
    `missing` where there is nothing.

    A file of more than 256 MiB counts by its size and 64 blocks spread over it: training changes
    nearly every weight, and a model of a terabyte must not be read again to see that it is done.
    """
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not _is_hidden(entry))
        return _joined((name, digest(path / name)) for name in names)
    if not path.exists():
        return MISSING
    size, content = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()[:LENGTH]
        content.update(str(size).encode())
        for block in range(NUM_BLOCKS):
            file.seek(block * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            content.update(file.read(BLOCK_BYTES))
    return content.hexdigest()[:LENGTH]


def outputs(folder: Path) -> dict[str, str]:
    """Name → digest of everything that a stage has made."""
    if not folder.is_dir():
        return {}
    made = [path for path in folder.iterdir() if not _is_hidden(path)]
    return {path.name: digest(path) for path in sorted(made) if path.name not in NOT_OUTPUT}


def of_outputs(digests: dict[str, str]) -> str:
    """One digest of all that `outputs` found."""
    return _joined(sorted(digests.items()))


def of_value(value: Any) -> str:
    """Of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _joined(pairs: Iterable[tuple[str, str]]) -> str:
    whole = hashlib.sha256()
    for name, found in pairs:
        whole.update(f"{name}\0{found}\0".encode())
    return whole.hexdigest()[:LENGTH]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__pycache__"
