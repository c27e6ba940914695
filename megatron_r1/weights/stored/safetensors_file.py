"""One safetensors file: 8 bytes of header length, a JSON header, tensors without gaps.

The header is parsed here, not by the safetensors library, which maps the file (see raw.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_r1.errors import UserError
from megatron_r1.weights.stored.raw import read_box

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its safetensors dtype, its shape, the offset of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """The tensors of a file by name. Raises UserError, naming the file, when it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        try:
            self.tensors = self._header()
        except ValueError as error:
            os.close(self.file)
            raise UserError(f"{path} is damaged: {error}; fetch or write it again") from error

    def close(self) -> None:
        os.close(self.file)

    def read(self, name: str, starts: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A rectangle of a tensor, in its stored dtype."""
        at = self.tensors[name]
        return read_box(self.file, at.offset, at.shape, DTYPES[at.dtype], starts, sizes)

    def _header(self) -> dict[str, Stored]:
        size = os.fstat(self.file).st_size
        length = int.from_bytes(os.pread(self.file, 8, 0), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"its header claims {length} bytes, the file has {size}")
        try:
            entries = json.loads(os.pread(self.file, length, 8))
            entries.pop("__metadata__", None)
            found, last = {}, 0
            for name, entry in entries.items():
                start, end = entry["data_offsets"]
                found[name] = Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + start)
                if 8 + length + end > size:
                    raise ValueError(
                        f"{name} ends at byte {8 + length + end}, the file at {size}: it is cut off"
                    )
                last = max(last, end)
                known = DTYPES.get(entry["dtype"])
                if known and prod(entry["shape"]) * known.itemsize != end - start:
                    raise ValueError(f"{name} has {end - start} bytes, its shape says otherwise")
            if 8 + length + last != size:
                raise ValueError(f"its tensors end at byte {8 + length + last}, the file at {size}")
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"its header is not one of safetensors ({error!r})") from error
        return found
