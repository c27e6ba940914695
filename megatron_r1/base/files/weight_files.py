"""The safetensors files of a model folder: which belong to the model, their headers, and whether
they are whole. No torch."""

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.untrusted_files import read_json, require_inside

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""The format's names of dtypes, those that weights have, with their size."""
_LARGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors names it.
        shape: the length of each dimension, as the header says.
        offset: the place of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def open_safetensors(path: Path) -> tuple[int, dict[str, StoredTensor]]:
    """Return the open file and its tensors by name.

    Raises:
        UserError: the file is damaged or cut off; it names the file.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        return file, _read_header(file)
    except ValueError as error:
        os.close(file)
        raise UserError(
            f"{path} is damaged: {error}; fetch or write it again",
            key="weights",
            cause=Cause.MALFORMED,
        ) from error


def _read_header(file: int) -> dict[str, StoredTensor]:
    size = os.fstat(file).st_size
    if os.pread(file, 7, 0) == b"version":
        raise ValueError("it is a pointer of Git LFS; run git lfs pull")
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    try:
        entries = json.loads(os.pread(file, length, 8))
        entries.pop("__metadata__", None)
        tensors, last_end = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (start, end, *entry["shape"])):
                raise ValueError(f"{name} has sizes that are no whole numbers")
            tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + start)
            if 8 + length + end > size:
                raise ValueError(
                    f"{name} ends at byte {8 + length + end}, the file at {size}: it is cut off"
                )
            if start != last_end:
                raise ValueError(f"{name} begins at byte {start} of the data, not at {last_end}")
            last_end = end
            item_bytes = ITEM_BYTES.get(entry["dtype"])
            if item_bytes and prod(entry["shape"]) * item_bytes != end - start:
                raise ValueError(f"{name} has {end - start} bytes, its shape says otherwise")
        if 8 + length + last_end != size:
            raise ValueError(f"its tensors end at byte {8 + length + last_end}, the file at {size}")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not one of safetensors ({error!r})") from error
    return tensors


SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""What a folder without these two may hold instead."""
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Endings of names: buffers of older transformers, which no model reads."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a Hugging Face folder.

    Raises:
        UserError: there are none, the index lists files that are missing or outside of the folder,
            or the folder has two models.
    """
    single_file, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if (weight_map := read_index(folder)) is not None:
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            require_inside(file, folder, "weights")
        if missing_files := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{index} names files that {folder} lacks: {', '.join(missing_files)}; fetch them",
                key="weights",
                cause=Cause.NOT_FOUND,
            )
        if single_file.is_file() and single_file not in files:
            raise UserError(
                f"{folder} has {SINGLE_FILE} and {INDEX_FILE}, which names other files: "
                "transformers reads "
                "the former, vLLM and this project the latter; remove what is old",
                key="weights",
                cause=Cause.DUPLICATE,
            )
        if unread_file := next((file for file in files if file.suffix != ".safetensors"), None):
            raise UserError(
                f"{index} names {unread_file.name}, which is no .safetensors file; fetch it again",
                key="weights",
                cause=Cause.MALFORMED,
            )
        return files
    if not single_file.is_file():
        other_names = sorted(
            file.name for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)
        )
        raise UserError(
            f"{folder} has neither {single_file.name} nor {index.name}"
            + (f", only {', '.join(other_names[:4])}" if other_names else "")
            + "; fetch them (weights in other formats are not read: load them with transformers, "
            "and save_pretrained writes these files)",
            key="weights",
            cause=Cause.NOT_FOUND,
        )
    require_inside(single_file, folder, "weights")
    return [single_file]


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the name of the file of each tensor, by the folder's index; None without one.

    Raises:
        UserError: the index is damaged.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return None
    require_inside(index, folder, "weights")
    content = read_json(index, "weights")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and 0 < len(name) < 256 for name in names):
        raise UserError(
            f"{index} is damaged: its weight_map must give each tensor's file; fetch it again",
            key="weights",
            cause=Cause.MALFORMED,
        )
    return weight_map


def tensor_names(folder: Path) -> set[str]:
    """Return the names of the tensors that a model folder says to have; none where it has no
    weights, or files that `require_complete` refuses."""
    with contextlib.suppress(UserError):
        if (index := read_index(folder)) is not None:
            return set(index)
        file, tensors = open_safetensors(weight_files(folder)[0])
        os.close(file)
        return set(tensors)
    return set()


def require_complete(folder: Path) -> None:
    """Raise UserError naming a weight file that is damaged or cut off, or that has not what the
    index says. Headers and sizes are read."""
    tensors_of_files = {}
    for path in weight_files(folder):
        file, tensors_of_files[path] = open_safetensors(path)
        os.close(file)
    require_as_indexed(folder, tensors_of_files)


def require_as_indexed(folder: Path, tensors_of_files: Mapping[Path, Collection[str]]) -> None:
    """Raise UserError for a tensor stored twice, or in another file than the index says.

    A tensor that one file has and the index lacks is read: transformers and vLLM read it, too.

    Args:
        folder: the model's folder.
        tensors_of_files: file -> names of its tensors.
    """
    home: dict[str, Path] = {}
    for path, names in tensors_of_files.items():
        if repeated_names := sorted(home.keys() & set(names)):
            raise UserError(
                f"{', '.join(repeated_names[:8])}: in {home[repeated_names[0]]} and in {path}; "
                "readers differ in which they take: remove one (load the folder with transformers, "
                "and save_pretrained writes each once)",
                key="weights",
                cause=Cause.DUPLICATE,
            )
        home |= dict.fromkeys(names, path)
    misplaced_files = {
        name: file
        for name, file in (read_index(folder) or {}).items()
        if home.get(name) != folder / file and not name.endswith(IGNORED_SUFFIXES)
    }
    if misplaced_files:
        descriptions = [
            f"{name} is not in {file} but in {home[name].name if name in home else 'no file'}"
            for name, file in sorted(misplaced_files.items())[:8]
        ]
        raise UserError(
            f"{folder / INDEX_FILE} and the files differ in {len(misplaced_files)} tensors: "
            f"{'; '.join(descriptions)}; "
            "fetch the index and these files again",
            key="weights",
            cause=Cause.CONFLICT,
        )
