"""Blocks that distinguish a large file from others."""

from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 65_536


def sample_blocks(path: Path, num_blocks: int) -> Iterator[bytes]:
    """Yield blocks of a file at equal distances, from its first to its last bytes. Of a file
    smaller than a block each one is the whole content.

    Args:
        path: the file.
        num_blocks: how many blocks of `BLOCK_BYTES` are read, at least 2."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for block in range(num_blocks):
            file.seek(block * max(0, size - BLOCK_BYTES) // (num_blocks - 1))
            yield file.read(BLOCK_BYTES)
