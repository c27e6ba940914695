"""Files that others wrote, a model folder's above all: JSON in bounded time, no files elsewhere,
its safetensors files, their headers and whether they are whole, and blocks that distinguish large
files. No torch.

A folder that was downloaded may hold anything: JSON nested so deeply that every copy of it fails,
a key twice with two values, names and links that lead to other files of this machine, and
safetensors headers that do not match the file's size."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError

MOST_LEVELS = 64
"""Levels of a JSON document. Released configurations have 6 at most."""
MOST_BYTES = 256 << 20
"""Size of a JSON document: the index of 100,000 tensors has 10 MB, the largest tokenizers 40."""

BLOCK_BYTES = 65_536

READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin")
"""Suffixes of the files of a model folder that this project, transformers or vLLM read."""


def read_json(path: Path, key: str) -> Any:
    """Return the content of a JSON file, UTF-8.

    Args:
        path: a file that others wrote.
        key: the key of errors.

    Raises:
        UserError: naming the file where it is no JSON, has a key twice with two values, more than
            MOST_LEVELS levels, or more than MOST_BYTES bytes.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, and at most {MOST_BYTES:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        _check_levels(content)
        return content
    except (ValueError, RecursionError) as error:
        too_deep = isinstance(error, RecursionError)
        reason = f"it has more than {MOST_LEVELS} levels" if too_deep else str(error)
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
    for _ in range(MOST_LEVELS):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecursionError


def require_own_files(folder: Path, key: str) -> None:
    """Raise UserError for a file of a model folder, of those that anything reads, that lies
    elsewhere (`require_inside`)."""
    for path in sorted(folder.iterdir()):
        if path.suffix in READ:
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
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(Path(os.path.realpath(home.parent.parent / "blobs")))
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise UserError(
            f"{path} leads to {real}, outside of {folder}, and is not opened; if that file belongs "
            "to the model, copy it into the folder",
            key=key,
            cause=Cause.CONFLICT,
        )


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
    """One tensor of a file: its safetensors dtype, its shape, the offset of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def open_safetensors(path: Path) -> tuple[int, dict[str, StoredTensor]]:
    """Return the open file and its tensors by name. Raises UserError, naming the file, where it is
    damaged or cut off."""
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
        tensors, last = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (start, end, *entry["shape"])):
                raise ValueError(f"{name} has sizes that are no whole numbers")
            tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + start)
            if 8 + length + end > size:
                raise ValueError(
                    f"{name} ends at byte {8 + length + end}, the file at {size}: it is cut off"
                )
            if start != last:
                raise ValueError(f"{name} begins at byte {start} of the data, not at {last}")
            last = end
            known = ITEM_BYTES.get(entry["dtype"])
            if known and prod(entry["shape"]) * known != end - start:
                raise ValueError(f"{name} has {end - start} bytes, its shape says otherwise")
        if 8 + length + last != size:
            raise ValueError(f"its tensors end at byte {8 + length + last}, the file at {size}")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not one of safetensors ({error!r})") from error
    return tensors


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""What a folder without these two may hold instead."""
IGNORED = (".rotary_emb.inv_freq",)
"""Endings of names: buffers of older transformers, which no model reads."""


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a Hugging Face folder.

    Raises UserError where there are none, for files that its index lists but are missing or outside
    of the folder, and for two models in one folder."""
    single, index = folder / SINGLE, folder / INDEX
    if (weight_map := read_index(folder)) is not None:
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            require_inside(file, folder, "weights")
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{index} names files that {folder} lacks: {', '.join(missing)}; fetch them",
                key="weights",
                cause=Cause.NOT_FOUND,
            )
        if single.is_file() and single not in files:
            raise UserError(
                f"{folder} has {SINGLE} and {INDEX}, which names other files: transformers reads "
                "the former, vLLM and this project the latter; remove what is old",
                key="weights",
                cause=Cause.DUPLICATE,
            )
        if other := next((file for file in files if file.suffix != ".safetensors"), None):
            raise UserError(
                f"{index} names {other.name}, which is no .safetensors file; fetch it again",
                key="weights",
                cause=Cause.MALFORMED,
            )
        return files
    if not single.is_file():
        found = sorted(file.name for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
        raise UserError(
            f"{folder} has neither {single.name} nor {index.name}"
            + (f", only {', '.join(found[:4])}" if found else "")
            + "; fetch them (weights in other formats are not read: load them with transformers, "
            "and save_pretrained writes these files)",
            key="weights",
            cause=Cause.NOT_FOUND,
        )
    require_inside(single, folder, "weights")
    return [single]


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the name of the file of each tensor, by the folder's index; None without one. Raises
    UserError where it is damaged."""
    index = folder / INDEX
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
    held = {}
    for path in weight_files(folder):
        file, held[path] = open_safetensors(path)
        os.close(file)
    require_as_indexed(folder, held)


def require_as_indexed(folder: Path, held: Mapping[Path, Collection[str]]) -> None:
    """Raise UserError for a tensor that two files have, and for one that is not in the file that
    the index gives.

    A tensor that one file has and the index lacks is read: transformers and vLLM read it, too.

    Args:
        folder: the model's folder.
        held: file -> names of its tensors.
    """
    home: dict[str, Path] = {}
    for path, names in held.items():
        if twice := sorted(home.keys() & set(names)):
            raise UserError(
                f"{', '.join(twice[:8])}: in {home[twice[0]]} and in {path}; readers differ in "
                "which they take: remove one (load the folder with transformers, and "
                "save_pretrained writes each once)",
                key="weights",
                cause=Cause.DUPLICATE,
            )
        home |= dict.fromkeys(names, path)
    wrong = {
        name: file
        for name, file in (read_index(folder) or {}).items()
        if home.get(name) != folder / file and not name.endswith(IGNORED)
    }
    if wrong:
        listed = [
            f"{name} is not in {file} but in {home[name].name if name in home else 'no file'}"
            for name, file in sorted(wrong.items())[:8]
        ]
        raise UserError(
            f"{folder / INDEX} and the files differ in {len(wrong)} tensors: {'; '.join(listed)}; "
            "fetch the index and these files again",
            key="weights",
            cause=Cause.CONFLICT,
        )


def spread_blocks(path: Path, num_blocks: int) -> Iterator[bytes]:
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
