"""Files that are complete or absent: the functions of `r1_grading.base.files`.

The modules: who may read what a run writes (`access`), blocks of a large file (`file_blocks`),
append-only files (`framed_records`, `json_lines` with its `line_writer`), files that others wrote
(`untrusted_files`), the weights of a model folder (`weight_files`)."""

from r1_grading.base.files import atomic_write, atomic_writer, fsync, make_folder

__all__ = ["atomic_write", "atomic_writer", "fsync", "make_folder"]
