"""Files that are complete or absent (`r1_grading.base.files`), who may read them (`access`), blocks
of them (`file_blocks`), and how many may be open (`open_files`)."""

from r1_grading.base.files import atomic_write, atomic_writer, fsync, make_folder

from megatron_r1.base.files.access import (
    READ_ONLY,
    Readers,
    allow_readers,
    allow_readers_as,
    narrow_readers,
)
from megatron_r1.base.files.file_blocks import BLOCK_BYTES, sample_blocks
from megatron_r1.base.files.open_files import allow_open_files

__all__ = [
    "BLOCK_BYTES",
    "READ_ONLY",
    "Readers",
    "allow_open_files",
    "allow_readers",
    "allow_readers_as",
    "atomic_write",
    "atomic_writer",
    "fsync",
    "make_folder",
    "narrow_readers",
    "sample_blocks",
]
