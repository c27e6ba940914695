"""The header of a safetensors file, checked against the file's size. No torch."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError

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


def open_file(path: Path) -> tuple[int, dict[str, StoredTensor]]:
    """Return the open file and its tensors by name. Raises UserError, naming the file, where it is
    damaged or cut off."""
    file = os.open(path, os.O_RDONLY)
    try:
        return file, _read(file)
    except ValueError as error:
        os.close(file)
        raise UserError(
            f"{path} is damaged: {error}; fetch or write it again",
            key="weights",
            cause=Cause.MALFORMED,
        ) from error


def _read(file: int) -> dict[str, StoredTensor]:
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
