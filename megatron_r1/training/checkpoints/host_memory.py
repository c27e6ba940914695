"""Buffers for what is on its way to disk, kept from one checkpoint to the next.

Fresh memory is slow: its pages are made one by one, and on a GPU they have to be pinned for a fast
copy. The price is its size for the whole run: what one rank writes, and its part of the optimizer
whole.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from megatron_r1 import platform


class HostMemory:
    """Of one rank; what it gave out is overwritten after the next `reuse`."""

    def __init__(self) -> None:
        self._copies: dict[tuple, list[Tensor]] = {}
        self._num_used: dict[tuple, int] = {}
        self._gathered: dict[Hashable, Tensor] = {}
        self._storages: set[int] = set()

    def reuse(self) -> None:
        """All copies are free again."""
        self._num_used = {}

    def gathered(self, name: Hashable, numel: int) -> Tensor:
        """fp32 [numel]: the buffer called `name`, as it was left."""
        buffer = self._gathered.get(name)
        if buffer is None or buffer.numel() != numel:
            buffer = self._gathered[name] = _empty((numel,), torch.float32)
            self._storages.add(buffer.untyped_storage().data_ptr())
        return buffer

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor` on the host, contiguous, alone in its storage, and nobody else's.

        A part of a gathered buffer is that already. From a GPU it is there after a synchronize.
        """
        tensor = tensor.detach()
        is_ours = tensor.untyped_storage().data_ptr() in self._storages
        if is_ours and tensor.is_contiguous():
            return torch.from_numpy(tensor.numpy())  # a storage of its own, which torch.save wants
        kind = (tuple(tensor.shape), tensor.dtype)
        index = self._num_used.get(kind, 0)
        self._num_used[kind] = index + 1
        buffers = self._copies.setdefault(kind, [])
        if index == len(buffers):
            buffers.append(_empty(*kind))
        return buffers[index].copy_(tensor, non_blocking=True)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=platform.has_gpu())
