"""Writes Megatron's distributed checkpoints (torch_dist), without Megatron.

A written folder has the content of a trainer's save: files of tensors, each chunk a `torch.save`
of its own; `.metadata`, as `dcp` reads it; `common.pt`, the state that is not tensors (empty here);
`metadata.json`, the name of the format."""

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_r1.base.files import atomic_write

_FORMAT = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    '"common_backend": "torch", "common_backend_version": 1}'
)
_DCP_VERSION = "1.0.0"


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor.

    Attributes:
        key: the tensor's name.
        starts: first index along each dimension.
        sizes: its shape."""

    key: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk in a file.

    Attributes:
        chunk: the rectangle.
        file: the file's name.
        offset: its first byte in the file.
        length: the number of its bytes."""

    chunk: Chunk
    file: str
    offset: int
    length: int


def write_chunks(path: Path, chunks: Iterable[tuple[Chunk, Tensor]]) -> list[WrittenChunk]:
    """Write one `.distcp` file and sync it, with one chunk's tensor in memory at a time."""
    written_chunks = []
    with open(path, "wb") as file:
        for chunk, values in chunks:
            buffer = io.BytesIO()
            # A clone where it is a view: torch.save writes the whole storage behind a tensor.
            is_whole_storage = values.numel() * values.itemsize == values.untyped_storage().nbytes()
            torch.save(
                values if is_whole_storage and values.is_contiguous() else values.clone(), buffer
            )
            start = file.tell()
            file.write(buffer.getbuffer())
            written_chunks.append(WrittenChunk(chunk, path.name, start, file.tell() - start))
        file.flush()
        os.fsync(file.fileno())
    return written_chunks


def write_metadata(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    written: Iterable[WrittenChunk],
) -> None:
    """Write the metadata that makes the `.distcp` files in `folder` a checkpoint.

    Args:
        folder: the checkpoint's folder.
        shapes: the shape of each tensor, by key.
        dtypes: the dtype of each tensor, by key.
        written: what `write_chunks` returned for all files.
    """
    tensors = {
        key: TensorStorageMetadata(TensorProperties(dtypes[key]), torch.Size(shape), [])
        for key, shape in shapes.items()
    }
    storage = {}
    for record in written:
        starts, sizes = torch.Size(record.chunk.starts), torch.Size(record.chunk.sizes)
        tensors[record.chunk.key].chunks.append(ChunkStorageMetadata(starts, sizes))
        index = MetadataIndex(record.chunk.key, starts)
        storage[index] = _StorageInfo(record.file, record.offset, record.length)
    metadata = Metadata(
        dict(tensors), storage_data=storage, storage_meta=StorageMeta(), version=_DCP_VERSION
    )
    common_bytes = io.BytesIO()
    torch.save({}, common_bytes)
    atomic_write(folder / "common.pt", common_bytes.getvalue())
    atomic_write(folder / ".metadata", pickle.dumps(metadata))
    atomic_write(folder / "metadata.json", _FORMAT)
