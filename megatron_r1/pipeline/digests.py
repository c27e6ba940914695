"""Digests of files and values, by which a pipeline sees that they are not what they were."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_r1.base.files.file_blocks import sample_blocks

WHOLE_BYTES = 256 * 1024**2
"""Larger files count by their size and some blocks, so that the status of a pipeline with a
terabyte's model takes seconds."""
NUM_BLOCKS = 64
"""Blocks of a larger file that count (`sample_blocks`)."""
MISSING = "missing"
DIGEST_CHARS = 16
"""Hexadecimal digits of a SHA-256 that are kept: 64 bits."""


def digest_path(path: Path) -> str:
    """Return the digest of a file's content, or of the names and contents in a folder (hidden ones
    left out); MISSING where there is neither.

    A file of more than WHOLE_BYTES counts by its size and 64 blocks spread over it: training
    changes nearly every weight."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not is_hidden(entry))
        return _digest_pairs((name, digest_path(path / name)) for name in names)
    if not path.exists():
        return MISSING
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_CHARS]
    content = hashlib.sha256(str(size).encode())
    for block in sample_blocks(path, NUM_BLOCKS):
        content.update(block)
    return content.hexdigest()[:DIGEST_CHARS]


def digest_of_outputs(digests: dict[str, str]) -> str:
    """Return one digest of a stage's outputs, name → digest; their order does not matter."""
    return _digest_pairs(sorted(digests.items()))


def digest_of_value(value: Any) -> str:
    """Return `DIGEST_CHARS` hexadecimal digits of the SHA-256 of a JSON value, its keys sorted."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def _digest_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, part in pairs:
        digest.update(f"{name}\0{part}\0".encode())
    return digest.hexdigest()[:DIGEST_CHARS]


def is_hidden(path: Path) -> bool:
    """Return whether a file or folder does not count."""
    return path.name.startswith(".") or path.name == "__pycache__"
