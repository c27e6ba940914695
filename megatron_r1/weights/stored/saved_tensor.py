"""Finds the raw data of a tensor written by `torch.save`, without loading it.

`torch.save` writes an uncompressed zip of a pickle that describes the tensor, and the data."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from dataclasses import dataclass
from math import prod

import torch

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}


def describe_saved(file: int, at: int, length: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Return (dtype, shape, file offset of the raw data) of a contiguous tensor.

    file: a descriptor; the `torch.save` is at [at, at + length). Raises BadZipFile, UnpicklingError
    or KeyError for other content."""
    with zipfile.ZipFile(_Slice(file, at, length)) as archive:
        root = archive.namelist()[0].split("/")[0]
        described = _Description(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        data = archive.getinfo(f"{root}/data/{described.storage}")
    if data.compress_type != zipfile.ZIP_STORED or not described.contiguous:
        raise KeyError("its tensor is not plain")
    if data.file_size != prod(described.shape) * described.dtype.itemsize:
        raise KeyError(f"its data has {data.file_size} bytes, its shape is {described.shape}")
    # The local file header has 30 bytes, the last four of them the lengths of name and extra field.
    header = os.pread(file, 30, at + data.header_offset)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return described.dtype, described.shape, at + data.header_offset + 30 + name + extra


@dataclass(frozen=True)
class _Described:
    storage: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    contiguous: bool


class _Description(pickle.Unpickler):
    """Reads the pickle of one tensor without creating or running anything that is named in it."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")

    def persistent_load(self, saved):
        kind, dtype, key, _, _ = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unexpected {kind}")
        return key, dtype

    @staticmethod
    def _describe(storage, offset, shape, strides, *rest) -> _Described:
        key, dtype = storage
        expected = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        same = all(a == b for a, b, n in zip(strides, expected, shape, strict=True) if n > 1)
        return _Described(key, dtype, tuple(shape), same and not offset)


class _Slice(io.RawIOBase):
    """`length` bytes of a file from offset `at`, as a file object."""

    def __init__(self, file: int, at: int, length: int):
        self.source, self.at, self.length, self.position = file, at, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        data = os.pread(self.source, count, self.at + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
