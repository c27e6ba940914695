"""Takes a trainer rank's parameters and optimizer state off its device while engines compute there
(`parallel.offload_between_phases`), and brings them back.

The storages are copied and then resized to nothing: every tensor stays the object it was, and all
views of a storage (Megatron's buffers, their buckets, model parameters, the optimizer's shards of
fp32 parameters) are views of it again when it has its size back."""

import ctypes
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes import timeline
from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.trainer.offload_stores import DiskStore, HostMemoryStore, Store
from megatron_r1.trainer.operations import needs_optimizer, needs_parameters

StateKind = Literal["parameters", "optimizer"]


class NetworkOwner(Protocol):
    """`Trainer` or `Critic`: it has the chunks of a trained network and Megatron's optimizer."""

    model_chunks: Sequence[torch.nn.Module]
    optimizer: Any


class Offload:
    """Parameters and optimizer state of a rank's networks, on the device or offloaded.

    Args:
        networks: returns the owners of the rank's networks, policy and critic.
        make_store: makes the store of one kind."""

    def __init__(
        self, networks: Callable[[], Sequence[NetworkOwner]], make_store: Callable[[], Store]
    ):
        self._networks = networks
        self._stores: dict[StateKind, Store] = {
            "parameters": make_store(),
            "optimizer": make_store(),
        }
        self._offloaded: dict[StateKind, list[tuple[torch.UntypedStorage, int]]] = {}
        """The storages that have no memory, and the bytes of each."""

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the device that are free because of this."""
        return sum(size for storages in self._offloaded.values() for _, size in storages)

    @timeline.timed("trainer/offload")
    def free_memory(self, *, free_parameters: bool) -> None:
        """Take the optimizer's state off the device, and with `free_parameters` the parameters.

        Raises:
            UserError: host memory or disk have no room; what was not offloaded then still is on the
                device.
        """
        storages_by_kind = self._storages_by_kind()
        for kind in ("optimizer", "parameters") if free_parameters else ("optimizer",):
            if kind in self._offloaded:
                continue
            storages = storages_by_kind[kind]
            self._stores[kind].write([_as_bytes(storage) for storage in storages])
            self._offloaded[kind] = [(storage, storage.nbytes()) for storage in storages]
            for storage in storages:
                _release_storage(storage)

    @timeline.timed("trainer/onload")
    def restore(self, *kinds: StateKind) -> None:
        """Bring these kinds back, if they are offloaded."""
        for kind in kinds:
            storages = self._offloaded.get(kind)
            if storages is None:
                continue
            for storage, size in storages:
                if not storage.resizable():
                    continue
                if storage.nbytes():
                    raise RuntimeError(
                        f"{storage.nbytes()} bytes of {kind} were allocated while they were "
                        "offloaded: something has used them meanwhile"
                    )
                storage.resize_(size)
            self._stores[kind].read([_as_bytes(storage) for storage, _ in storages])
            del self._offloaded[kind]

    def prepare(self, operation: str) -> None:
        """Bring back what `operation`, one of the controller's calls, works with."""
        if needs_parameters(operation):
            self.restore("parameters")
        if needs_optimizer(operation):
            self.restore("optimizer")

    def _storages_by_kind(self) -> dict[StateKind, list[torch.UntypedStorage]]:
        """Return the storages of either kind, each once. What the optimizer of an fp32 model has of
        its parameters are views of these."""
        pointers: set[int] = set()
        networks = self._networks()

        def unseen_storages(tensors: Iterator[Tensor]) -> list[torch.UntypedStorage]:
            storages = []
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage._cdata not in pointers and tensor.device.type == platform.device().type:
                    pointers.add(storage._cdata)
                    storages.append(storage)
            return [storage for storage in storages if storage.nbytes()]

        return {
            "parameters": unseen_storages(
                p for n in networks for chunk in n.model_chunks for p in chunk.parameters()
            ),
            "optimizer": unseen_storages(
                t for n in networks for t in _optimizer_tensors(n.optimizer)
            ),
        }


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield the parameters that Adam updates and its moments, of all parts of the optimizer."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        torch_optimizer = part.optimizer
        for group in torch_optimizer.param_groups if torch_optimizer is not None else ():
            yield from group["params"]
        for state in torch_optimizer.state.values() if torch_optimizer is not None else ():
            # A step count of a tensor's own is on the CPU already, or a few bytes.
            yield from (t for name, t in state.items() if torch.is_tensor(t) and name != "step")


def _release_storage(storage: torch.UntypedStorage) -> None:
    """Give the memory of a storage back to the device, and all values of it up.

    A storage in host memory that NumPy has seen once, for a push or an export, cannot be resized
    any more: its pages are given back instead, and read as zeros."""
    if storage.resizable():
        storage.resize_(0)
        return
    begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    _as_bytes(storage).zero_()
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        address, size = ctypes.c_void_p(first), ctypes.c_size_t(length)
        if ctypes.CDLL(None, use_errno=True).madvise(address, size, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise does not give back a storage's pages")


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def make_offload(config: Config, networks: Callable[[], Sequence[NetworkOwner]]) -> Offload | None:
    """Return the rank's `Offload`; None where the recipe has none.

    Raises:
        UserError: the folder is not there or cannot be written to.
    """
    place, folder = config.parallel.offload_between_phases, config.parallel.offload_folder
    if place == "none":
        return None
    if place == "host":
        return Offload(networks, HostMemoryStore)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"parallel.offload_folder: no file can be made in {folder or tempfile.gettempdir()} "
            f"({error.strerror or error}); name a folder of a local disk of every node",
            key="parallel.offload_folder",
            cause=Cause.UNREADABLE,
        ) from error
    return Offload(networks, lambda: DiskStore(folder))
