"""Reads rectangles of Megatron's distributed checkpoints (torch_dist), without Megatron.

`.metadata` is that of torch.distributed.checkpoint: the tensors, the chunks each was saved in, and
for every chunk the file and byte range. A chunk is written by `torch.save`: an uncompressed zip of
a pickle that describes the tensor and its raw data. Only the bytes of the requested rectangles are
read, so that no chunk, however large, is ever whole in memory. `dcp_writer` writes such folders."""

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.weights.formats.tensor_files import read_region

Box = Sequence[int]


@dataclass(frozen=True)
class _StoredChunk:
    """One saved rectangle of a tensor.

    Attributes:
        starts: first index along each dimension.
        sizes: its shape.
        file: the file's name.
        offset: the first byte of its `torch.save` in the file.
        length: bytes of its `torch.save`."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


class DistributedCheckpoint:
    """The tensors of a checkpoint folder.

    Args:
        folder: the checkpoint's folder.

    Attributes:
        shapes: the shape of each tensor, by key.
        dtypes: the dtype of each tensor, by key.
        objects: the keys of what is no tensor, sorted.

    Raises:
        UserError: the folder is not such a checkpoint, or a file is missing or truncated.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        metadata = _read_metadata(self.path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key] = tuple(entry.size)
                self.dtypes[key] = entry.properties.dtype
        self.objects = sorted(metadata.state_dict_metadata.keys() - self.shapes.keys())
        self._metadata = metadata
        self._files: dict[str, int] = {}
        self._data_offsets: dict[tuple[str, int], int] = {}
        self._check_files()

    def close(self) -> None:
        """Close the open files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    @cached_property
    def num_bytes(self) -> int:
        """The size of all tensor files together."""
        return sum(file.stat().st_size for file in self.path.glob("*.distcp"))

    def read(self, key: str, starts: Box, sizes: Box) -> Tensor:
        """Return a rectangle of the tensor `key`, of shape `sizes`, in its stored dtype.

        Args:
            key: the tensor's key in the checkpoint.
            starts: the first index of each dimension.
            sizes: the rectangle's size in each dimension.

        Raises:
            UserError: where the chunks do not cover it, or are damaged.
        """
        out = torch.empty(tuple(sizes), dtype=self.dtypes[key])
        num_covered = 0
        for chunk in self._overlap_candidates(key, starts, sizes):
            overlap = _overlapping_box(starts, sizes, chunk)
            if overlap is None:
                continue
            first, size = overlap
            offsets = tuple(f - c for f, c in zip(first, chunk.starts, strict=True))
            target = out
            for axis, (f, start, n) in enumerate(zip(first, starts, size, strict=True)):
                target = target.narrow(axis, f - start, n)
            target.copy_(self._read_chunk(key, chunk, offsets, size))
            num_covered += prod(size)
        if num_covered != out.numel():
            raise UserError(
                f"{self.path} holds {num_covered} of the {out.numel()} elements of {key} at "
                f"{tuple(starts)}: it is not complete; use another checkpoint",
                key="checkpoint",
                cause=Cause.MALFORMED,
            )
        return out

    def read_object(self, key: str) -> Any:
        """Return what was saved under `key` that is no tensor: of plain values and tensors.

        Args:
            key: one of `objects`.

        Raises:
            UserError: its bytes are damaged, or hold something else."""
        (storage,) = (
            storage for index, storage in self._metadata.storage_data.items() if index.fqn == key
        )
        with open(self.path / storage.relative_path, "rb") as file:
            file.seek(storage.offset)
            saved_bytes = io.BytesIO(file.read(storage.length))
        try:
            return torch.load(saved_bytes, weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            cause = str(error).partition("\n")[0]
            raise UserError(
                f"{key} in {self.path / storage.relative_path} is damaged ({cause}); use another "
                "checkpoint",
                key="checkpoint",
                cause=Cause.MALFORMED,
            ) from error

    def chunks(self, key: str) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yield (writing rank, starts, sizes) of each rectangle that a tensor was saved in.

        Args:
            key: the tensor's key."""
        for chunk in (chunk for bucket in self._chunks_by_start[key].values() for chunk in bucket):
            # Files are called __RANK_NUMBER.distcp.
            rank = int(chunk.file.removeprefix("__").partition("_")[0])
            yield rank, list(chunk.starts), list(chunk.sizes)

    def writers(self, key: str, indices: Tensor) -> set[int]:
        """Return the ranks that wrote some elements of a tensor.

        Args:
            key: the tensor's key.
            indices: the elements, of shape (elements, dimensions)."""
        ranks = set()
        for rank, starts, sizes in self.chunks(key):
            first = torch.tensor(starts, dtype=torch.int64)
            end = first + torch.tensor(sizes, dtype=torch.int64)
            if ((indices >= first) & (indices < end)).all(dim=1).any():
                ranks.add(rank)
        return ranks

    @cached_property
    def _chunks_by_start(self) -> dict[str, dict[int, list[_StoredChunk]]]:
        """The chunks of each key, by their start along the first axis."""
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key in self.shapes
            for chunk in entry.chunks
        }
        chunks: dict[str, dict[int, list[_StoredChunk]]] = defaultdict(lambda: defaultdict(list))
        for index, storage in self._metadata.storage_data.items():
            if index.fqn in self.shapes:
                starts = tuple(index.offset)
                size = sizes[index.fqn, starts]
                chunk = _StoredChunk(
                    starts, size, storage.relative_path, storage.offset, storage.length
                )
                chunks[index.fqn][starts[0] if starts else 0].append(chunk)
        return chunks

    def _overlap_candidates(self, key: str, starts: Box, sizes: Box) -> list[_StoredChunk]:
        """Return the chunks that may overlap the rectangle, of stacked tensors only its layers."""
        buckets = self._chunks_by_start[key]
        if len(starts) == 3:
            layers = range(starts[0], starts[0] + sizes[0])
            candidates = [chunk for index in layers for chunk in buckets.get(index, [])]
            if candidates and all(chunk.sizes[0] == 1 for chunk in candidates):
                return candidates
        return [chunk for bucket in buckets.values() for chunk in bucket]

    def _read_chunk(self, key: str, chunk: _StoredChunk, starts: Box, sizes: Box) -> Tensor:
        if chunk.file not in self._files:
            self._files[chunk.file] = os.open(self.path / chunk.file, os.O_RDONLY)
        try:
            offset = self._data_offset(key, chunk)
            return read_region(
                self._files[chunk.file], offset, chunk.sizes, self.dtypes[key], starts, sizes
            )
        except (RuntimeError, LookupError, ValueError, EOFError, pickle.UnpicklingError) as error:
            label, cause = f"{key} at {chunk.starts}", str(error).partition("\n")[0]
            raise UserError(
                f"{label} in {self.path / chunk.file} is damaged ({cause}); use another checkpoint",
                key="checkpoint",
                cause=Cause.MALFORMED,
            ) from error

    def _data_offset(self, key: str, chunk: _StoredChunk) -> int:
        """Return the offset in the file of a chunk's raw data. The pickle alone is read: loaded on
        the meta device, it gives a tensor that knows the offset of its data."""
        offset = self._data_offsets.get((chunk.file, chunk.offset))
        if offset is None:
            with open(self.path / chunk.file, "rb") as file:
                view = _create_file_view(file, chunk.offset, chunk.length)
                saved_tensor = torch.load(
                    cast(IO[bytes], view), map_location="meta", weights_only=True
                )
            if (saved_tensor.dtype, tuple(saved_tensor.shape)) != (self.dtypes[key], chunk.sizes):
                raise LookupError(
                    f"the metadata says {chunk.sizes}, the file {saved_tensor.dtype} "
                    f"{tuple(saved_tensor.shape)}"
                )
            if not saved_tensor.is_contiguous() or saved_tensor.storage_offset():
                raise LookupError("its tensor is not plain")
            # Experimental, and without a public counterpart: where torch.load would read a meta
            # tensor's data (torch 2.11, 2.13).
            offset = chunk.offset + saved_tensor.untyped_storage()._checkpoint_offset
            self._data_offsets[chunk.file, chunk.offset] = offset
        return offset

    def _check_files(self) -> None:
        end_by_file: dict[str, int] = defaultdict(int)
        for storage in self._metadata.storage_data.values():
            end_by_file[storage.relative_path] = max(
                end_by_file[storage.relative_path], storage.offset + storage.length
            )
        absent_files = sorted(name for name in end_by_file if not (self.path / name).is_file())
        if absent_files:
            raise UserError(
                f"checkpoint {self.path} lacks files: {', '.join(absent_files)}; copy it whole, or "
                "use another checkpoint",
                key="checkpoint",
                cause=Cause.NOT_FOUND,
            )
        for name, end in sorted(end_by_file.items()):
            size = (self.path / name).stat().st_size
            if size < end:
                raise UserError(
                    f"{self.path / name} has {size} bytes of at least {end}: it is cut off; use "
                    "another checkpoint",
                    key="checkpoint",
                    cause=Cause.MALFORMED,
                )


def _read_metadata(folder: Path) -> Metadata:
    metadata_file = folder / "metadata.json"
    if not metadata_file.is_file() or not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} is no Megatron distributed checkpoint: it lacks metadata.json or .metadata; "
            "give a folder such as RUN/checkpoints/step_00000012",
            key="checkpoint",
            cause=Cause.NOT_FOUND,
        )
    try:
        backend = json.loads(metadata_file.read_text(encoding="utf-8")).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{metadata_file} is damaged ({error}); use another checkpoint",
            key="checkpoint",
            cause=Cause.MALFORMED,
        ) from error
    if backend != "torch_dist":
        raise UserError(
            f"{folder} was written in Megatron's format {backend!r}; save it as 'torch_dist'",
            key="checkpoint",
            cause=Cause.UNSUPPORTED,
        )
    try:
        return FileSystemReader(folder).read_metadata()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        LookupError,
        ValueError,
        TypeError,
    ) as error:
        raise UserError(
            f"{folder / '.metadata'} is damaged ({error}); use another checkpoint",
            key="checkpoint",
            cause=Cause.MALFORMED,
        ) from error


def _overlapping_box(starts: Box, sizes: Box, chunk: _StoredChunk) -> tuple[Box, Box] | None:
    first = tuple(max(a, b) for a, b in zip(starts, chunk.starts, strict=True))
    ends = zip(starts, sizes, chunk.starts, chunk.sizes, first, strict=True)
    size = tuple(min(s + n, c + m) - f for s, n, c, m, f in ends)
    return None if any(n <= 0 for n in size) else (first, size)
