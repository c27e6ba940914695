"""Host buffers for checkpoints, kept from one checkpoint to the next.

Fresh memory is slow: its pages are faulted in one by one, and on a GPU they have to be pinned for a
fast copy. The price is that the memory is taken for the whole run: what one rank writes, and its
part of the optimizer whole."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from megatron_r1 import platform


class HostMemory:
    """The buffers of one rank; the next save overwrites them after `reuse`."""

    def __init__(self) -> None:
        self._copies: dict[tuple, list[Tensor]] = {}
        self._num_used: dict[tuple, int] = {}
        self._gathered: dict[Hashable, Tensor] = {}
        self._storages: set[int] = set()

    def reuse(self) -> None:
        """Mark all copies as free."""
        self._num_used = {}

    def gathered(self, name: Hashable, numel: int) -> Tensor:
        """Return the buffer called `name`, fp32 [numel], with its previous content."""
        buffer = self._gathered.get(name)
        if buffer is None or buffer.numel() != numel:
            buffer = self._gathered[name] = platform.empty_on_host((numel,), torch.float32)
            self._storages.add(buffer.untyped_storage().data_ptr())
        return buffer

    def copy(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on the host, contiguous and alone in its storage.

        A part of a gathered buffer is not copied again. A copy from a GPU is complete after
        `platform.synchronize`."""
        tensor = tensor.detach()
        is_gathered = tensor.untyped_storage().data_ptr() in self._storages
        if is_gathered and tensor.is_contiguous():
            # A view with a storage of its own: torch.save writes the whole storage.
            return torch.from_numpy(tensor.numpy())
        kind = (tuple(tensor.shape), tensor.dtype)
        index = self._num_used.get(kind, 0)
        self._num_used[kind] = index + 1
        buffers = self._copies.setdefault(kind, [])
        if index == len(buffers):
            buffers.append(platform.empty_on_host(*kind))
        return buffers[index].copy_(tensor, non_blocking=True)
